"""Checkpoints that are whole or not there.

They are written to a temporary folder, marked complete, and renamed. A killed process leaves at
most a folder named `.step-…`, which nothing reads and the next save removes. The mark,
`complete.json`, lists every file with its size. So a folder that a copy or a full disk cut short
does not count.

Each file is a tree for `torch.save`. Tensors that an engine shards are in `shards/` instead,
written by the processes that hold them (`shards`). `load` puts the two together, so nothing else
has to know which kind a checkpoint is.
"""

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from finetune.errors import UserError
from finetune.run.folder import (
    MARK,
    checkpoint_path,
    complete_steps,
    is_complete,
    newest_checkpoint,
)
from finetune.training.shards import (
    SHARDS,
    Own,
    put_in_shards,
    refusals_of_the_disk,
    take_out_shards,
    write_shards,
)


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run, `root/step-00000052/`.

    With several processes every process calls `save`. Process 0 writes, and each process writes its
    shards if the engine has any. `gather` joins the lists of all processes, and waits for them.
    """

    root: Path
    keep: int  # how many of the newest are kept; the best is kept too
    is_main: bool = True
    gather: Callable[[list[str]], list[str]] = list

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return checkpoint_path(self.root, step)

    def save(self, step: int, files: Mapping[str, Any], *, best_step: int | None) -> Path:
        """Write `files` (name -> object for `torch.save`) as the checkpoint of `step`.

        Then checkpoints that are no longer kept are removed. So are later ones: they are from
        before the run went back to an earlier one. Raises UserError, on every process, if a disk
        refuses; the earlier checkpoints are untouched then.
        """
        temporary = self.root / f".step-{step:08d}"
        plain, shards = take_out_shards(files)
        with self._agreed(step, temporary):
            if self.is_main:
                self._begin(temporary)
        if shards:
            with self._agreed(step, temporary):
                _check_shared(temporary)
            with self._agreed(step, temporary):
                write_shards(temporary / SHARDS, shards)
        with self._agreed(step, temporary):
            if self.is_main:
                self._finish(step, temporary, plain)
        if self.is_main:
            self._prune(step, best_step)
        return self.path(step)

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        return complete_steps(self.root)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return newest_checkpoint(self.root)

    def _begin(self, temporary: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for stale in self.root.glob(".step-*"):
            shutil.rmtree(stale)
        temporary.mkdir()

    def _finish(self, step: int, temporary: Path, files: Mapping[str, Any]) -> None:
        for name, content in files.items():
            _write_file(temporary / name, content)
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in written}
        (temporary / MARK).write_text(json.dumps({"step": step, "files": sizes}))
        if self.path(step).exists():
            shutil.rmtree(self.path(step))
        os.replace(temporary, self.path(step))

    @contextmanager
    def _agreed(self, step: int, temporary: Path) -> Iterator[None]:
        """Have every process end this part of a save, or every process raise the same UserError."""
        refusal = None
        try:
            yield
        except OSError as error:
            refusal = error
        refusals = self.gather([] if refusal is None else [refusal.strerror or str(refusal)])
        if not refusals:
            return
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        previous = self.newest()
        kept = (
            f"the previous checkpoint {previous} is untouched"
            if previous
            else "there is no earlier checkpoint"
        )
        raise UserError(
            f"the checkpoint of step {step} could not be written to {self.root}: "
            f"{refusals[0]}; {kept}"
        ) from refusal

    def _prune(self, newest: int, best_step: int | None) -> None:
        steps = self.steps()
        kept = {*[step for step in steps if step <= newest][-self.keep :], best_step}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.path(step))


def load(folder: Path, name: str, *, own: Own = lambda place: None) -> Any:
    """Load one file of a checkpoint to the CPU.

    `own(place)` may return this process's shard of the tensor at `place`. That tensor is then
    loaded as a shard.
    """
    tree = torch.load(folder / name, map_location="cpu", weights_only=True)
    return put_in_shards(tree, folder / SHARDS, name, own)


def find_checkpoint(resume: str, checkpoints: Path) -> Path | None:
    """Return the folder that `--resume auto|PATH` means, or None if `auto` finds none.

    PATH is a checkpoint, or a run's folder, meaning its newest complete checkpoint. Raises
    UserError.
    """
    if resume == "auto":
        return newest_checkpoint(checkpoints)
    folder = Path(resume)
    if not folder.is_dir():
        raise UserError(
            f"there is no checkpoint at {folder}. "
            f"Give a folder such as {checkpoints / 'step-00000100'}, or auto"
        )
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder / "checkpoints")
        if newest is None:
            raise UserError(f"the run {folder} has no complete checkpoint to resume from")
        return newest
    if not is_complete(folder):
        raise UserError(
            f"{folder} is not a complete checkpoint ({MARK} is missing or does not match the "
            "files). Try --resume auto"
        )
    return folder


def _write_file(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        with refusals_of_the_disk():
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _check_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"{socket.gethostname()} does not see it (output_dir must be on a disk that all hosts "
            "share)",
        )


def agree_on_checkpoint(checkpoint: Path | None, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint that process 0 found. Raises UserError if a process does not see it."""
    if accelerator.num_processes == 1:
        return checkpoint
    chosen = broadcast_object_list([None if checkpoint is None else str(checkpoint)])[0]
    sees = chosen is None or is_complete(Path(chosen))
    blind = gather_object(
        [] if sees else [f"process {accelerator.process_index} on {socket.gethostname()}"]
    )
    if blind:
        raise UserError(
            f"the checkpoint {chosen} is not there for {', '.join(blind)}. "
            "Put output_dir on a disk that all hosts share"
        )
    return None if chosen is None else Path(chosen)
