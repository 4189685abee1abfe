"""A folder that is written beside its place and renamed, so that it is whole or as it was.

A killed process leaves `.NAME.part`, or between two renames `.NAME.old`. The next one that writes
the same folder puts that in order. Each of these folders has the marker, also the finished one: it
lists the files, so that a file which someone added is not deleted with them.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import UserError
from finetune.run.claim import write_marker
from finetune.run.files import sync_file, sync_folder, temporary_of
from finetune.run.marker import MARKER, Kind, Marker, is_marked, read_marker, remove_own


def check_replaceable(dest: Path, kind: Kind = "model") -> None:
    """Raise UserError if `dest` has a file that would be lost if a new `kind` took its place."""
    if not os.path.lexists(dest) or (dest.is_dir() and not any(dest.iterdir())):
        return
    marker = read_marker(dest)
    if marker is None or marker.kind != kind:
        raise UserError(
            f"{dest} is there, and is not a {kind} that finetune wrote (it has no such {MARKER}). "
            "Name another folder, or move that one"
        )
    added = sorted(_files(dest) - set(marker.files))
    if added:
        raise UserError(
            f"{dest / added[0]} would be deleted with the {kind} in {dest}, and finetune did not "
            "write it. Move that file"
        )


@contextlib.contextmanager
def replacing(dest: Path, kind: Kind = "model") -> Iterator[Path]:
    """Yield an empty folder, which takes the place of `dest` if the block succeeds.

    Of a link to a folder, that folder is replaced. Raises UserError as `check_replaceable`, or if
    another process is writing `dest`, and OSError if the disk refuses. Then `dest` is as it was.
    """
    dest = dest.resolve() if dest.is_dir() else dest
    work, aside = (dest.with_name(f".{dest.name}.{part}") for part in ("part", "old"))
    dest.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _begin(work, kind)
    try:
        if os.path.lexists(aside):
            _put_back(aside, dest, kind)
        check_replaceable(dest, kind)
        yield work
        write_marker(work, Marker(kind, files=tuple(_files(work))))
        open_to_others(work)
        for path in sorted(work.rglob("*")):
            sync_file(path) if path.is_file() else sync_folder(path)
        sync_folder(work)
        _swap(work, dest, aside)
        sync_folder(dest.parent)
    finally:
        if os.path.lexists(work):
            with contextlib.suppress(OSError):
                _empty(work)
                (work / MARKER).unlink()
                work.rmdir()
        os.close(descriptor)


def _begin(work: Path, kind: Kind) -> int:
    """Make `work` an empty folder with the marker, and return a descriptor that locks it."""
    if os.path.lexists(work) and not _is_ours(work, kind):
        raise UserError(f"{work} is needed, and finetune did not make it. Move it")
    work.mkdir(exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is writing {work}. Wait until it ends") from error
    except OSError:
        pass  # a disk without locks
    write_marker(work, Marker(kind))
    _empty(work)
    return descriptor


def _empty(work: Path) -> None:
    """Delete everything in `work` but the marker, which says that the rest may be deleted."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()


def _is_ours(folder: Path, kind: Kind) -> bool:
    """Return whether a killed process left `folder`: it has the marker, or had just been made."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    begun = {temporary_of(folder / MARKER)}
    return is_marked(folder, kind) or set(folder.iterdir()) <= begun


def _put_back(aside: Path, dest: Path, kind: Kind) -> None:
    """Undo what a process left that was killed while it put a new folder in the place of `dest`."""
    if not aside.is_symlink() and not _is_ours(aside, kind):
        raise UserError(f"{aside} is needed, and finetune did not make it. Move it")
    if os.path.lexists(dest):
        discard(aside)
    else:
        aside.rename(dest)


def _swap(work: Path, dest: Path, aside: Path) -> None:
    """Put `work` in the place of `dest`.

    A folder cannot replace a full one in one step, so the old one is moved aside first.
    """
    if not os.path.lexists(dest) or not any(dest.iterdir()):
        work.rename(dest)
        return
    dest.rename(aside)
    try:
        work.rename(dest)
    except OSError:
        aside.rename(dest)
        raise
    discard(aside)


def discard(folder: Path) -> None:
    """Delete a folder that was written so: a link, or what its marker lists."""
    if folder.is_symlink():
        folder.unlink()
    else:
        marker = read_marker(folder)
        remove_own(folder, () if marker is None else marker.files, MARKER)


def _files(folder: Path) -> set[str]:
    """Return the files in `folder` and in its folders, without the marker."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in found} - {MARKER}


def open_to_others(folder: Path) -> None:
    """Give a folder and what is in it the rights that the system gives to new files.

    safetensors makes its files private, and tempfile its folders. Raises OSError.
    """
    umask = _umask()
    for path in (folder, *folder.rglob("*")):
        had, given = (path.stat().st_mode, 0o777) if path.is_dir() else (0, 0o666)
        path.chmod(had | given & ~umask)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
