"""The command line: one file for each group of commands, in the order of `finetune --help`.

A command's function imports what it needs when it runs, so that the help is instant. A user's
mistake, or a full disk, is one message on stderr and exit code 2. FINETUNE_TRACEBACK=1 also prints
where it was raised. A run that a signal stopped exits with 130.
"""

import io
import sys

import typer

# importing registers the commands, in the order of --help
# isort: off
from finetune.cli import setup, train, use, serve, results, compare  # noqa: F401

# isort: on
from finetune.cli.app import app
from finetune.errors import UserError, disk_refusal, print_chain, visible


def main() -> None:
    """Run the command line, and exit. `finetune` and `python -m finetune` both start here."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot encode is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="finetune", standalone_mode=False))
    except Exception as error:
        if (message := _message(error)) is None:
            raise
        print_chain(error)
        typer.echo(f"finetune: {' '.join(visible(message).splitlines())}", err=True)
        sys.exit(2)


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
    context = getattr(error, "ctx", None)
    return f"{message}. See `{context.command_path if context else 'finetune'} --help`"
