"""Checkpoints that are whole or not there: written to a temporary folder, marked complete, renamed.

Floor 2. A killed process leaves at most a folder named `.step-…`, which nothing reads and the next save removes. The mark,
`complete.json`, lists every file with its size, so a folder that was cut short by a copy or a full disk does not count either.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError

MARK = "complete.json"


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run, `root/step-00000052/`.

    With several processes every process calls `save`; process 0 writes, all wait at `barrier`.
    """

    root: Path
    keep: int  # the newest so many; the best is kept besides
    is_main: bool = True
    barrier: Callable[[], None] = _nothing

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def save(self, step: int, files: Mapping[str, Any], *, best_step: int | None) -> Path:
        """Write `files` (name -> object for `torch.save`) as the checkpoint of `step`, then remove those no longer kept.

        Raises UserError where the disk refuses; the earlier checkpoints are untouched then.
        """
        if self.is_main:
            self._write(step, files)
            self._prune(best_step)
        self.barrier()
        return self.path(step)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, oldest first."""
        folders = self.root.glob("step-*") if self.root.is_dir() else ()
        found = (re.fullmatch(r"step-(\d{8,})", folder.name) for folder in folders)
        return sorted(int(match[1]) for match in found if match and is_complete(self.root / match[0]))

    def newest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def _write(self, step: int, files: Mapping[str, Any]) -> None:
        final, temporary = self.path(step), self.root / f".step-{step:08d}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for stale in self.root.glob(".step-*"):
                shutil.rmtree(stale)
            temporary.mkdir()
            for name, content in files.items():
                _write_file(temporary / name, content)
            sizes = {name: (temporary / name).stat().st_size for name in files}
            (temporary / MARK).write_text(json.dumps({"step": step, "files": sizes}))
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            previous = self.newest()
            kept = f"the previous checkpoint {previous} is untouched" if previous else "there is no earlier checkpoint"
            reason = error.strerror or str(error)
            raise UserError(f"the checkpoint of step {step} could not be written to {self.root}: {reason}; {kept}") from error

    def _prune(self, best_step: int | None) -> None:
        steps = self.steps()
        for step in steps[: -self.keep]:
            if step != best_step:
                shutil.rmtree(self.path(step))


def load(folder: Path, name: str) -> Any:
    """Read one file of a checkpoint to the CPU."""
    return torch.load(folder / name, map_location="cpu", weights_only=True)


def is_complete(folder: Path) -> bool:
    """Whether every file that the mark lists is there with its size."""
    try:
        sizes = json.loads((folder / MARK).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def find_checkpoint(resume: str, checkpoints: Path) -> Path | None:
    """The folder that `--resume auto|PATH` means; None where `auto` finds no complete checkpoint.

    PATH is a checkpoint, or a run's folder (its newest complete checkpoint). Raises UserError.
    """
    if resume == "auto":
        return CheckpointStore(checkpoints, keep=1).newest()
    folder = Path(resume)
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint at {folder}; give a folder such as {checkpoints / 'step-00000100'}, or auto")
    if (folder / "checkpoints").is_dir():
        newest = CheckpointStore(folder / "checkpoints", keep=1).newest()
        if newest is None:
            raise UserError(f"the run {folder} has no complete checkpoint to resume from")
        return newest
    if not is_complete(folder):
        raise UserError(f"{folder} is not a complete checkpoint ({MARK} is missing or does not match the files); try --resume auto")
    return folder


def _write_file(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch closes its archive on the way out and hides the refusal of the disk behind that
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())
