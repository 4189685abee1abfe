"""Checkpoints that are whole or not there.

They are written to a temporary folder, marked complete, and renamed. A killed process leaves at
most a folder named `.step-…`, which nothing reads and the next save removes. The mark,
`complete.json`, lists every file with its size and its hash. So a folder that a copy or a full disk
cut short does not count, and bits that a disk turned are noticed before training goes on with them.

The hash is XXH3 with 128 bits (https://xxhash.com), computed piece by piece while the piece is
written, and still in the processor's cache.

Each file is a tree for `torch.save`. Tensors that an engine shards are in `shards/` instead,
written by the processes that hold them (`shards`). `load` puts the two together, so nothing else
has to know which kind a checkpoint is.
"""

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from finetune.errors import Border, UserError
from finetune.run.files import path_of, sync_folder
from finetune.run.folder import (
    MARK,
    Mark,
    checkpoint_path,
    complete_steps,
    is_complete,
    newest_checkpoint,
    no_checkpoint,
    read_mark,
    remove_checkpoint,
    remove_unfinished,
    step_folders,
)
from finetune.training.form import check_tree
from finetune.training.shards import (
    SHARDS,
    Own,
    put_in_shards,
    refusals_of_the_disk,
    take_out_shards,
    write_shards,
)

PIECE = 1 << 17  # bytes that are written and hashed at once: less than the processor's cache
ANOTHER = "Take another checkpoint"
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # errors of a missing file


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

        Then checkpoints that are no longer kept are removed (see `prune`). Raises UserError, on
        every process, if a disk refuses; the earlier checkpoints are untouched then.
        """
        temporary = self.root / f".step-{step:08d}"
        plain, shards = take_out_shards(files)
        what = f"the checkpoint of step {step} could not be written to {self.root}"
        with self._agreed(what, temporary):
            if self.is_main:
                self._begin(temporary)
        if shards:
            with self._agreed(what, temporary):
                _check_shared(temporary)
            with self._agreed(what, temporary):
                write_shards(temporary / SHARDS, shards)
        with self._agreed(what, temporary):
            if self.is_main:
                self._finish(step, temporary, plain)
        self.prune(step, best_step=best_step)
        return self.path(step)

    def prune(self, newest: int, *, best_step: int | None) -> None:
        """Delete what is not kept if `newest` is the newest step: older ones, and later ones.

        So is what a killed save or a killed deletion has left. Raises UserError, on every process,
        if a disk refuses.
        """
        with self._agreed(f"an old checkpoint could not be removed from {self.root}"):
            if self.is_main:
                self._prune(newest, best_step)

    def remove_later(self, step: int) -> None:
        """Delete the checkpoints of later steps alone. Raises UserError as `prune` does."""
        with self._agreed(f"a later checkpoint could not be removed from {self.root}"):
            for later, folder in step_folders(self.root).items() if self.is_main else ():
                if later > step:
                    remove_checkpoint(folder)

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        return complete_steps(self.root)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return newest_checkpoint(self.root)

    def _begin(self, temporary: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.root)
        temporary.mkdir()

    def _finish(self, step: int, temporary: Path, files: Mapping[str, Any]) -> None:
        hashes = {name: _write_file(temporary / name, files[name]) for name in files}
        for path in sorted((temporary / SHARDS).glob("*")):
            hashes[f"{SHARDS}/{path.name}"] = hash_of(path)
        sizes = {name: (temporary / name).stat().st_size for name in hashes}
        with (temporary / MARK).open("w", encoding="utf-8") as file:
            file.write(Mark(step, sizes, hashes).as_text())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        self._make_room(self.path(step))
        os.replace(temporary, self.path(step))
        sync_folder(self.root)

    def _make_room(self, place: Path) -> None:
        """Delete an earlier checkpoint at `place`. What else is there gets another name."""
        remove_checkpoint(place)
        number = 1
        while os.path.lexists(place):
            aside = place.with_name(f"{place.name}.other{number}")
            if not os.path.lexists(aside):
                place.rename(aside)
            number += 1

    @contextmanager
    def _agreed(self, what: str, temporary: Path | None = None) -> Iterator[None]:
        """Have every process end this part of a save, or every process raise the same UserError.

        `what` says what was not possible.
        """
        refusal = None
        try:
            yield
        except OSError as error:
            refusal = error
        refusals = self.gather([] if refusal is None else [refusal.strerror or str(refusal)])
        if not refusals:
            return
        if self.is_main and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        previous = self.newest()
        kept = (
            f"the previous checkpoint {previous} is untouched"
            if previous
            else "there is no earlier checkpoint"
        )
        raise UserError(f"{what}: {refusals[0]}; {kept}") from refusal

    def _prune(self, newest: int, best_step: int | None) -> None:
        remove_unfinished(self.root)
        folders = step_folders(self.root)
        complete = [step for step, folder in folders.items() if is_complete(folder)]
        kept = {*[step for step in complete if step <= newest][-self.keep :], best_step}
        for step, folder in folders.items():
            if step not in kept:  # also one that is half removed
                remove_checkpoint(folder)


def load(folder: Path, name: str, *, own: Own = lambda place: None) -> Any:
    """Load one file of a checkpoint to the CPU.

    `own(place)` may return this process's shard of the tensor at `place`. That tensor is then
    loaded as a shard.
    """
    with Border(f"{folder / name} cannot be read", do=ANOTHER):
        tree = torch.load(folder / name, map_location="cpu", weights_only=True)
    with as_written(folder / name):
        check_tree(tree)
    return put_in_shards(tree, folder / SHARDS, name, own)


def identity_of(checkpoint: Path) -> Mapping[str, str]:
    """Return what a resumed run must share with the run of a checkpoint. Raises UserError."""
    state = load(checkpoint, "training.pt")
    identity = state.get("identity") if isinstance(state, Mapping) else None
    if not isinstance(identity, Mapping):
        raise UserError(f"{checkpoint / 'training.pt'} is not what a run writes. {ANOTHER}")
    return identity


def check_identity(
    checkpoint: Path, identity: Mapping[str, str], changed: Callable[[], Sequence[str]] = tuple
) -> None:
    """Raise UserError if the checkpoint belongs to another model, other data or another setting.

    `changed()` returns the settings that are not those of the checkpoint's run, to explain it.
    """
    then = identity_of(checkpoint)
    for what, now in identity.items():
        if then.get(what) == now:
            continue
        settings = [] if "." in what else list(changed())
        given = ", ".join(settings) or f"then {_short(then.get(what))}, now {_short(now)}"
        raise UserError(
            f"{checkpoint} cannot be resumed: {what} changed ({given}). Restore it, or start a new "
            "run in another output_dir"
        )


def _short(value: str | None) -> str:
    """Return a value, of a hash its beginning."""
    text = str(value)
    return text[:8] if re.fullmatch("[0-9a-f ]{16,}", text) else text


@contextmanager
def as_written(file: Path) -> Iterator[None]:
    """Raise a UserError for the TypeError of a check that a file of a checkpoint does not pass."""
    try:
        yield
    except TypeError as error:
        raise UserError(f"{file} is not what a run writes: {error}. {ANOTHER}") from error


def find_checkpoint(
    resume: str, checkpoints: Path, *, note: Callable[[str], None] = lambda text: None
) -> Path | None:
    """Return the folder that `--resume auto|PATH` means, or None if `auto` finds none.

    PATH is a checkpoint, or a run's folder, meaning its newest complete checkpoint. `note` gets a
    sentence about each newer one that is damaged. Raises UserError.
    """
    if resume == "auto":
        return _newest_whole(checkpoints, note)
    folder = path_of(resume)
    if not folder.is_dir():
        raise no_checkpoint(folder, checkpoints)
    if (folder / "checkpoints").is_dir():
        newest = _newest_whole(folder / "checkpoints", note)
        if newest is None:
            raise UserError(f"the run {folder} has no complete checkpoint to resume from")
        return newest
    if (damage := damage_of(folder)) is not None:
        raise UserError(f"{folder} is not a complete checkpoint: {damage}. Try --resume auto")
    return folder


def _newest_whole(checkpoints: Path, note: Callable[[str], None]) -> Path | None:
    damaged, whole = [], None
    for folder in reversed(step_folders(checkpoints).values()):
        damage = damage_of(folder)
        if damage is None:
            whole = folder
            break
        damaged.append(f"the checkpoint {folder} is damaged: {damage}")
    for sentence in damaged:
        note(sentence if whole is None else f"{sentence}. An older one is taken")
    return whole


def damage_of(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, or None if they are as they were saved.

    Every byte is read. Raises UserError if the system refuses that, as the files may be whole.
    """
    try:
        return _damage_of(checkpoint)
    except OSError as error:
        raise UserError(
            f"{error.filename or checkpoint} cannot be read ({error.strerror or error}), and may "
            "be whole. Make it readable and start again, or move its checkpoint away"
        ) from error


def _damage_of(checkpoint: Path) -> str | None:
    mark = read_mark(checkpoint)
    if mark is None:
        with suppress(*_NOT_THERE):
            (checkpoint / MARK).read_bytes()
        return f"{MARK} is missing or cannot be read"
    for name, size in mark.sizes.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, and {size:,} were written"
            if hash_of(path) != mark.hashes[name]:
                return f"{name} does not hold what was written"
        except _NOT_THERE as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def hash_of(path: Path) -> str:
    """Return the hash of the file at `path`, as the mark holds it."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            found.update(piece)
    return found.hexdigest()


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, xxhash.xxh3_128()

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), PIECE):
            piece = view[begin : begin + PIECE]
            self.hash.update(piece)
            self.file.write(piece)
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def _write_file(path: Path, content: Any) -> str:
    """Write `content` and return the hash of the file."""
    with path.open("wb") as file:
        hashed = _HashedFile(file)
        with refusals_of_the_disk():
            torch.save(content, hashed)  # type: ignore[arg-type]  # it needs write and flush alone
        file.flush()
        os.fsync(file.fileno())
    return hashed.hash.hexdigest()


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
