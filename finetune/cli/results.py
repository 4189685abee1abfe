"""`finetune report`, `export` and `push`: what a run leaves for others."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.cli.app import Trust, app, say_start


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
    trust_remote_code: Trust = False,
) -> None:
    """Write a run's model as a plain Hugging Face folder.

    The model is then loaded from there, and its logits are compared.
    """
    from finetune.recipes.build.look import look_at_export

    look_at_export(run, dest, checkpoint)
    say_start()
    from finetune.recipes.export import export_run

    export_run(run, dest, dtype=dtype, checkpoint=checkpoint, trust=trust_remote_code)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name there: OWNER/NAME.")],
    gguf: Annotated[
        list[Path] | None,
        typer.Option(help="A .gguf file to send too. Those in RUN are sent anyway."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only you may read it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files, and send nothing.")
    ] = False,
) -> None:
    """Put a run's model on the Hugging Face hub, with a card that says what it is.

    `hf auth login` stores the token for it.
    """
    from finetune.recipes.push import push_run

    push_run(run, name, gguf=gguf or (), private=private, dry_run=dry_run)
