"""A disk that refuses, in the middle of whatever command it is: what went wrong as one sentence.

Floor 5. A full disk is no bug, and its traceback helps no one; what a checkpoint and an export say of it is more, and comes first.
"""

import errno
import io
import os
import traceback
from pathlib import Path

from finetune.checkpoint import CheckpointStore
from finetune.run_dir import RunDir

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def refusal(error: OSError) -> str | None:
    """The file, the reason, and for a file of a run what is left of the run; None where `error` is something else."""
    if error.errno not in REFUSALS:
        return None
    file = _file_of(error)
    done = "opened" if error.errno == errno.EACCES else "written"
    return f"{file or 'a file'} could not be {done}: {error.strerror}{_left(RunDir(file.parent)) if file is not None else ''}"


def _file_of(error: OSError) -> Path | None:
    """The system names the file when it is opened, and not when it is written: then it is the last one that the stack holds."""
    found = error.filename
    for frame, _ in traceback.walk_tb(error.__traceback__ if found is None else None):
        files = [value for value in frame.f_locals.values() if isinstance(value, io.IOBase)]
        found = next((file.name for file in files if hasattr(file, "name")), found)
    return Path(found) if isinstance(found, str | os.PathLike) else None


def _left(run: RunDir) -> str:
    if not run.is_run():
        return ""
    newest = CheckpointStore(run.checkpoints, keep=1).newest()
    return (
        f"; the last complete checkpoint {newest} is untouched: --resume auto"
        if newest
        else "; there is no checkpoint yet"
    )
