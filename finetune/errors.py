"""The one exception for a user's mistake, the border to a library, and a disk that refuses.

The command line prints the message and exits with 2. Everything else is a bug and keeps its
traceback. FINETUNE_TRACEBACK=1 prints the traceback also for a mistake.

A message says what was given and what is allowed. What to do, if it is not obvious, is a sentence
of its own: "betas is 'high'. Give 2 numbers, e.g. [0.9, 0.999]". There is no full stop at the end.
"""

import contextlib
import difflib
import errno
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TextIO

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARIES = tuple(  # where the files of libraries are
    {
        os.path.realpath(path) + os.sep
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
        if (path := sysconfig.get_path(name))
    }
)
_LENGTH = 300  # characters of a reason; a library may write a page


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a person reads or writes here. Python's stream is None if it is closed."""
    return stream is not None and stream.isatty()


class UserError(ValueError):
    """A mistake in the user's input. The message is the whole explanation."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ". Did you mean 'x'?" for the nearest of `known`, or "" if nothing is near.

    It is the end of a message.
    """
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f". Did you mean {nearest[0]!r}?" if nearest else ""


class Border:
    """A block that calls a library with what a user gave. Its errors become a UserError.

    The message is `what` was not possible, the reason, and what to `do` if that is given. The
    error is chained. An error that code of ours raises keeps its traceback, also if the library
    has called that code. So a block holds nothing but the call. Errors that are `but` go on too.
    """

    def __init__(
        self,
        what: str,
        *,
        do: str = "",
        but: tuple[type[Exception], ...] = (),
        reason: Callable[[BaseException], str] | None = None,
    ) -> None:
        self._what, self._do, self._but, self._reason = what, do, but, reason or reason_of

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, (UserError, *self._but)):
            return
        if _is_of_library(error, trace):
            do = f". {self._do}" if self._do else ""
            raise UserError(f"{self._what}: {self._reason(error)}{do}") from error


def _is_of_library(error: BaseException, trace: TracebackType | None) -> bool:
    """Return whether a library raised `error` in a block whose traceback is `trace`.

    A function that is written in C has no frame, so the block itself may be the last one.
    """
    is_panic = type(error).__name__ == "PanicException"  # of Rust; it is no Exception
    if not (is_panic or isinstance(error, Exception)) or trace is None:
        return False
    depth = 0
    while trace.tb_next is not None:
        trace, depth = trace.tb_next, depth + 1
    file = trace.tb_frame.f_code.co_filename
    if depth == 0:
        return True
    if file.startswith("<"):  # generated code, such as a template
        return True
    of_model = trace.tb_frame.f_globals.get("__name__", "").startswith("transformers_modules.")
    in_library = os.path.realpath(file).startswith(_LIBRARIES) and not file.startswith(_PACKAGE)
    return of_model or in_library


def reason_of(error: BaseException) -> str:
    """Return why a library raised `error`: its first lines, as a part of a sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, LookupError | AttributeError | AssertionError | ArithmeticError) or (
        not text
    ):
        text = f"{type(error).__name__} {text}".strip()
    if len(text) > _LENGTH:
        whole = text[:_LENGTH].rpartition(". ")[0] or text[:_LENGTH]
        text = whole + " …"
    return text.rstrip(".;:, ")


def print_chain(error: BaseException) -> None:
    """Print the traceback of `error` and of its causes, if FINETUNE_TRACEBACK is set."""
    if os.environ.get("FINETUNE_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error, file=sys.stderr)


def visible(text: str) -> str:
    """Return `text` with its control characters escaped, but line breaks and tabs.

    Data and models may hold sequences that set a terminal's title or clear its screen. Marks that
    change the direction of what follows are escaped too.
    """
    return _CONTROL.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@contextlib.contextmanager
def system_errors(place: str | None = None) -> Iterator[None]:
    """Raise an OSError for what a library raises if the system refuses to write to `place`.

    tokenizers and safetensors are written in Rust. They raise errors of other classes, in whose
    text is the number, such as "File too large (os error 27)".
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError | UserError) or found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), place) from error


def disk_refusal(error: OSError) -> str | None:
    """Return a message with the file, if the system names it, and the reason.

    It is None if the error is not that of a disk or of a path. A full disk is not a bug, so a
    traceback would not help.
    """
    if error.errno not in (*_UNWRITABLE, *_UNUSABLE):
        return None
    done = "written" if error.errno in _UNWRITABLE else "opened"
    return f"{error.filename or 'a file'} could not be {done}: {error.strerror}"


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY, errno.ESTALE, errno.EBUSY),
    *(errno.EMFILE, errno.ENFILE, errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.ETXTBSY),
)
