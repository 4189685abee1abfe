"""The one exception for a user's mistake.

Floor 0. The command line prints a `UserError` as one sentence and exits with 2; everything else is a bug and keeps its
traceback. A message says what was given, what is allowed, and what to do.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something in the user's input is wrong; the message is the whole explanation."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of `known`, or "" where nothing is near."""
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
