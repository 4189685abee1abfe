"""The application, and the arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

import finetune

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STOPPED = 130  # the exit code of a command that a signal stopped; a signal is not a mistake

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The config, a YAML file. configs/ has examples.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the config (e.g. training.epochs=1)."),
]
Target = Annotated[
    str,
    typer.Argument(metavar="RUN|MODEL", help="A run's folder, a model's folder, or a hub name."),
]


def _print_version(asked: bool) -> None:
    if asked:
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
