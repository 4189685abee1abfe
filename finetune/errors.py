"""The one exception for a user's mistake, and the message for a disk that refuses.

The command line prints either and exits with 2. Everything else is a bug and keeps its traceback.

A message says what was given and what is allowed. What to do, if it is not obvious, is a sentence
of its own: "betas is 'high'. Give 2 numbers, e.g. [0.9, 0.999]". There is no full stop at the end.
"""

import difflib
import errno
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's input. The message is the whole explanation."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ". Did you mean 'x'?" for the nearest of `known`, or "" if nothing is near.

    It is the end of a message.
    """
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f". Did you mean {nearest[0]!r}?" if nearest else ""


def visible(text: str) -> str:
    """Return `text` with its control characters escaped, but line breaks and tabs.

    Data and models may hold sequences that set a terminal's title or clear its screen.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def disk_refusal(error: OSError) -> str | None:
    """Return a message with the file, if the system names it, and the reason.

    It is None if the error is not that of a disk. A full disk is not a bug, so a traceback would
    not help.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        return None
    done = "opened" if error.errno == errno.EACCES else "written"
    return f"{error.filename or 'a file'} could not be {done}: {error.strerror}"
