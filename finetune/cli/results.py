"""`finetune report`, `export` and `push`: what a run leaves for others."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.cli.app import Target, Trust, app, require_stdout, say_start

TextFiles = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="With --trim: also keep the tokens of this file (text, JSONL or a table). May be "
        "repeated.",
    ),
]
Kept = Annotated[
    list[str] | None,
    typer.Option(help="With --trim: also keep this token, id, or text. May be repeated."),
]
Frequent = Annotated[
    int, typer.Option(min=0, help="With --trim: also keep this many of the most frequent tokens.")
]
MinCoverage = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="With --trim: write nothing if less of the held-out text is kept (0.995 is "
        "99.5 % of its tokens).",
    ),
]
Gguf = Annotated[
    Literal["f32", "f16", "bf16", "q8_0"] | None,
    typer.Option(
        help="Also write a GGUF file of this format, for llama.cpp and Ollama, and a Modelfile."
    ),
]


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Write RUN/report.html again from the run's files."""
    from finetune.report import write_report

    typer.echo(write_report(run))


@app.command()
def export(
    target: Target,
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="The folder to write; it must not exist.")
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Data type of the exported weights."),
    ] = "float32",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Export this checkpoint of the run instead of model/.")
    ] = None,
    trim: Annotated[
        bool,
        typer.Option(
            "--trim", help="Keep only the tokens that the run used, special tokens and bytes."
        ),
    ] = False,
    text: TextFiles = None,
    keep: Kept = None,
    frequent: Frequent = 1000,
    min_coverage: MinCoverage = None,
    gguf: Gguf = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write the model of a run, or any model, as a plain Hugging Face folder.

    The model is then loaded from there, and its logits are compared.
    With --trim the tokenizer and the token table hold only what is used.
    """
    from finetune.recipes.build.look import look_at_export

    look_at_export(target, dest, checkpoint)
    say_start()
    from finetune.recipes.export.export import export_target
    from finetune.recipes.export.trim import TrimOptions

    options = TrimOptions(
        texts=text or (), keep=keep or (), frequent=frequent, min_coverage=min_coverage
    )
    if not trim and options != TrimOptions(texts=(), keep=()):
        raise typer.BadParameter(
            "--text, --keep, --frequent and --min-coverage go with --trim. Give --trim too"
        )
    export_target(
        target,
        dest,
        dtype=dtype,
        checkpoint=checkpoint,
        trim=options if trim else None,
        gguf=gguf,
        trust=trust_remote_code,
    )


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name on the hub: OWNER/NAME.")],
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
    if dry_run:
        require_stdout()
    from finetune.recipes.push import push_run

    push_run(run, name, gguf=gguf or (), private=private, dry_run=dry_run)
