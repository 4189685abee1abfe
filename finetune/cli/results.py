"""`finetune report` and `export`: what a run leaves for others."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.cli.app import app


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Write RUN/report.html again from the run's files."""
    from finetune.report import write_report

    typer.echo(write_report(run))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="The folder to write; it must not exist.")
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Data type of the exported weights."),
    ] = "float32",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Export this checkpoint instead of model/.")
    ] = None,
) -> None:
    """Write a run's model as a plain Hugging Face folder.

    The model is then loaded from there, and its logits are compared.
    """
    from finetune.recipes.export import export_run

    export_run(run, dest, dtype=dtype, checkpoint=checkpoint)
