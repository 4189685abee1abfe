"""The command line. A command's function imports what it needs when it runs, so that `finetune
--help` answers at once.

A user's mistake, or a full disk, is a sentence on stderr and exit code 2. A run that a signal
stopped exits with 130. Each file has the commands of one group; their order here is that of --help.
"""

import sys

import typer

# importing registers the commands, in the order of --help
# isort: off
from finetune.cli import train, use, results, compare  # noqa: F401

# isort: on
from finetune.cli.app import app
from finetune.errors import UserError, disk_refusal


def main() -> None:
    """Run the command line; the entry point of `finetune` and `python -m finetune`."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="finetune", standalone_mode=False))
    except Exception as error:
        if (said := _sentence(error)) is None:
            raise
        typer.echo(f"finetune: {said}", err=True)
        sys.exit(2)


def _sentence(error: Exception) -> str | None:
    """Return a mistake, or a full disk, as one sentence; None if it is a bug."""
    if isinstance(error, OSError):
        return disk_refusal(error)
    if not isinstance(error, typer.TyperException):
        return str(error) if isinstance(error, UserError) else None
    message = (
        " ".join(error.format_message().split())
        .removesuffix(".")
        .replace(". Did", "; did")
        .replace("Value error, ", "")
    )
    context = getattr(error, "ctx", None)
    return f"{message[:1].lower()}{message[1:]} (see `{context.command_path if context else 'finetune'} --help`)"
