"""The command line: one file for each group of commands, in the order of `finetune --help`.

A command's function imports what it needs when it runs, so that the help is instant. A user's
mistake, or a full disk, is one message on stderr and exit code 2. FINETUNE_TRACEBACK=1 also prints
where it was raised. A run that a signal stopped exits with 130.
"""

import io
import os
import signal
import sys
from types import FrameType

import typer

# importing registers the commands, in the order of --help
# isort: off
from finetune.cli import setup, train, use, serve, results, compare  # noqa: F401

# isort: on
from finetune.cli.app import STOPPED, app
from finetune.errors import UserError, disk_refusal, print_chain, visible

_STDOUT = "stdout"  # as the name of a file that could not be written


def main() -> None:
    """Run the command line, and exit. `finetune` and `python -m finetune` both start here."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot encode is escaped
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="finetune", standalone_mode=False)
        if (refused := _unwritten()) is not None:
            raise refused
    except Exception as error:
        refused = _unwritten()  # of what came before the error
        problem = error if refused is None or not isinstance(error, OSError) else refused
        if isinstance(problem, BrokenPipeError) and problem.filename == _STDOUT:
            sys.exit(1)  # its reader has enough, and typer ends so too
        if (message := _message(problem)) is None:
            raise
        try:
            print_chain(error)
            typer.echo(f"finetune: {' '.join(visible(message).splitlines())}", err=True)
        except OSError:  # a full disk, or nobody listens: the exit code still says it
            sys.stderr = None  # else Python would fail once more when it ends
        sys.exit(2)
    sys.exit(code)


def _unwritten() -> OSError | None:
    """Write what stdout still holds. Return the refusal of its disk or its reader, if any."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        sys.stdout = None  # else Python would fail once more when it ends
        return OSError(error.errno, error.strerror, _STDOUT)
    return None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end the process at once if it imports a module.

    An exception in the middle of torch's import can make its native code abort.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(STOPPED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _message(error: Exception) -> str | None:
    """Return what to print for a mistake or a full disk; None if the error is a bug."""
    if isinstance(error, OSError):
        return disk_refusal(error)
    if not isinstance(error, typer.TyperException):
        return str(error) if isinstance(error, UserError) else None
    text = " ".join(error.format_message().split()).removesuffix(".")
    text = text.replace("Value error, ", "").replace(" (Possible", " (possible")
    message = text[:1].lower() + text[1:]
    if message.endswith("?"):  # it has a remedy of its own: did you mean ...?
        return message
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", "")
    names = {param.name for param in context.command.params} if context else set()
    if "unexpected extra argument" in message and "prompt" in names:
        return f"{message}. Give a prompt as --prompt TEXT"
    if option and "overrides" in names:
        from finetune.config.mistakes import key_of_option

        if key := key_of_option(option):
            return f"no such option: {option}. Write {key}, as in KEY=VALUE, behind the config"
    return f"{message}. See `{context.command_path if context else 'finetune'} --help`"
