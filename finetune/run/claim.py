"""How a folder becomes ours, and stays with one process: by a marker, and by a lock."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from finetune.errors import UserError
from finetune.run.files import make_folder, write_text
from finetune.run.marker import MARKER, Kind, Marker, is_marked, read_marker

LOCK = ".finetune.lock"
"""The file that a process locks while it writes into the folder. It holds the host and the pid."""


def write_marker(folder: Path, marker: Marker) -> None:
    """Make `folder` if it is not there, and mark it. Raises UserError if the disk refuses."""
    make_folder(folder)
    write_text(folder / MARKER, marker.as_text())


def check_claim(folder: Path, kind: Kind, names: Iterable[Path]) -> None:
    """Raise UserError if `folder` is not a `kind` of ours, but holds one of the `names` that a
    `kind` writes.
    """
    marker = read_marker(folder)
    if marker is not None and marker.kind == kind:
        return
    if marker is not None:
        raise UserError(
            f"{folder} holds a {marker.kind}, and a {kind} needs a folder of its own. "
            "Name another folder"
        )
    taken = next((path for path in names if os.path.lexists(path)), None)
    if taken is not None:
        raise UserError(
            f"{taken} would be replaced, and finetune did not make it ({folder} has no {MARKER}, "
            "which a copy of a run needs too). Name another folder, or move what is there"
        )


def claim_folder(folder: Path, kind: Kind, names: Iterable[Path]) -> None:
    """Mark `folder` as ours unless it is. Raises UserError as `check_claim`, or for a disk."""
    check_claim(folder, kind, names)
    if not is_marked(folder, kind):
        write_marker(folder, Marker(kind))


@contextlib.contextmanager
def locked(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold `folder` for this process. The kernel lets go of it if the process dies.

    A folder that is not there is made, and deleted again if it was not claimed meanwhile. `note`
    gets a sentence if the disk has no locks. Raises UserError if another process holds the folder,
    or if it cannot be written.
    """
    lock = folder / LOCK
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(lock, note)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"the folder {folder} cannot be written: {reason}") from error
    try:
        yield
    finally:
        if not os.path.lexists(folder / MARKER):
            with contextlib.suppress(OSError):
                lock.unlink()
                for path in made:
                    path.rmdir()
        os.close(descriptor)


def _take(lock: Path, note: Callable[[str], None]) -> int:
    """Return the descriptor of the locked file."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_there(lock, descriptor):  # its holder has just deleted it
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{lock.parent} is in use by {holder or 'another process'}. "
                "Wait until that process ends, or name another output_dir"
            ) from error
        except OSError as error:
            note(
                f"{lock.parent} cannot be locked ({error.strerror}), as on some network disks. "
                "Nothing would stop a second run there, so start one at a time"
            )
        return descriptor


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_held(folder: Path) -> bool:
    """Return whether a process holds `folder` now."""
    try:
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
