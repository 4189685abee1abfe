"""The one exception for a user's mistake, and the sentence for a disk that refuses.

The command line prints either as one sentence and exits with 2. Everything else is a bug and keeps
its traceback. A message says what was given, what is allowed, and what to do.
"""

import difflib
import errno
from collections.abc import Iterable


class UserError(ValueError):
    """Something in the user's input is wrong; the message is the whole explanation."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of `known`, or "" if nothing is near."""
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def disk_refusal(error: OSError) -> str | None:
    """Return the file, if the system names it, and the reason; None if no disk refuses.

    A full disk is no bug, so its traceback would help no one.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        return None
    done = "opened" if error.errno == errno.EACCES else "written"
    return f"{error.filename or 'a file'} could not be {done}: {error.strerror}"
