"""The application, and the arguments that several commands share."""

import inspect
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

import finetune
from finetune.errors import UserError
from finetune.run.log import VERBOSITY

_LOUDNESS = {
    "quiet": Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results and errors, and nothing else.")
    ],
    "verbose": Annotated[
        bool, typer.Option("--verbose", "-v", help="Print each step, and what libraries log.")
    ],
}


class _Application(typer.Typer):
    """A Typer whose every command also takes -q and -v."""

    def command(self, *names: Any, **options: Any) -> Callable[[Any], Any]:
        register = super().command(*names, **options)
        return lambda function: register(_with_loudness(function))


def _with_loudness(function: Callable[..., None]) -> Callable[..., None]:
    @wraps(function)
    def command(*, quiet: bool, verbose: bool, **arguments: Any) -> None:
        if quiet and verbose:
            raise typer.BadParameter("-q and -v are both given. Give one of them")
        os.environ[VERBOSITY] = "quiet" if quiet else "verbose" if verbose else ""
        if verbose:
            logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        try:
            function(**arguments)
        finally:
            del os.environ[VERBOSITY]

    signature = inspect.signature(function)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in _LOUDNESS.items()
    ]
    taken = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=[*taken, *more])  # type: ignore[attr-defined]
    command.__annotations__ = {**function.__annotations__, **_LOUDNESS}
    return command


app = _Application(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STOPPED = 130  # the exit code of a command that a signal stopped; a signal is not a mistake


def _complete_override(given: str) -> list[str]:
    """Return the keys that begin as `given` does, for the shell's completion."""
    from finetune.config.keys import list_keys

    names = [key.name for key in list_keys()]
    return [f"{name}=" for name in names if name.startswith(given)]


def _complete_target(given: str) -> list[str]:
    """Return the folders in runs/ that begin as `given` does, for the shell's completion."""
    runs = [path.parent.as_posix() for path in sorted(Path("runs").glob("*/config.yaml"))]
    return [run for run in runs if run.startswith(given)]


Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The config, a YAML file. configs/ has examples.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the config (e.g. training.epochs=1).",
        autocompletion=_complete_override,
    ),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="A run's folder, a model's folder, a .gguf file, package:NAME, or a hub name.",
        autocompletion=_complete_target,
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
]


def say_start() -> None:
    """Print the first line of a command that takes a while, before anything large is imported."""
    if "torch" not in sys.modules and os.environ[VERBOSITY] != "quiet":
        typer.echo("loading torch and transformers", err=True)


def require_stdout() -> None:
    """Raise UserError if stdout is closed: a command that prints its result would lose it.

    Python's stdout is then None, and what is printed there is dropped without an error.
    """
    if sys.stdout is None:
        raise UserError(
            "stdout is closed, so the result cannot be printed. Leave out >&-, or send stdout to a "
            "file or to /dev/null"
        )


def _print_version(asked: bool) -> None:
    if asked:
        require_stdout()
        typer.echo(f"finetune {finetune.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Fine-tune small causal language models for chat and translation."""
