"""The command line. Every command imports what it needs when it runs, so that `finetune --help` answers at once.

Floor 6. A user's mistake, or a full disk, is one sentence on stderr and exit code 2; a run stopped by a signal exits with 130.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import finetune
from finetune.errors import UserError, disk_refusal

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="A YAML file; configs/ has examples.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the config, e.g. training.epochs=1",
        show_default=False,
    ),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="A run's folder, a model's folder, or a hub name.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Longest answer, in tokens.", show_default=False)
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default=False)]
TopP = Annotated[
    float | None,
    typer.Option(help="Nucleus sampling: keep this much probability.", show_default=False),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep so many tokens; 0 is off.", show_default=False)
]
Penalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", help="Above 1 discourages repetition.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="For sampling.")]


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


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="auto (the newest complete checkpoint), or a checkpoint's or run's folder."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Build everything, print the resolved config, and stop before the first step.",
        ),
    ] = False,
    processes: Annotated[
        str | None,
        typer.Option(
            help="How many processes of this machine train: a number, or auto, one for each GPU."
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How many times to start again after a process died.")
    ] = 0,
) -> None:
    """Fine-tune a model as CONFIG says."""
    if processes is None and not restarts:
        from finetune.config import load_config
        from finetune.recipes.training import run_training

        stopped = run_training(load_config(config, overrides or ()), resume=resume, dry_run=dry_run)
    else:
        from finetune.recipes.launching import ProcessFailed, launch_training

        try:
            stopped = launch_training(
                config,
                overrides or (),
                processes=processes or "1",
                restarts=restarts,
                resume=resume,
                dry_run=dry_run,
            )
        except ProcessFailed as error:
            typer.echo(f"finetune: {error}", err=True)
            raise typer.Exit(1) from None
    if stopped == "signal":
        raise typer.Exit(130)


@app.command()
def demo(
    task: Annotated[
        Literal["chat", "translation"],
        typer.Argument(metavar="chat|translation", help="What to learn."),
    ],
    overrides: Overrides = None,
    short: Annotated[
        bool, typer.Option("--short", help="A few steps only, to see that everything works.")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="The run's folder.  [default: runs/demo-TASK]", show_default=False),
    ] = None,
) -> None:
    """Fine-tune SmolLM2-135M on the data that comes with the package, on a laptop's CPU."""
    from finetune.recipes.demo import run_demo

    if run_demo(task, overrides or (), short=short, output_dir=output_dir) == "signal":
        raise typer.Exit(130)


@app.command()
def inspect(
    config: Config,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(help="How many rendered examples to print.")] = 3,
) -> None:
    """Show what the model would see: rendered examples with the targets coloured, lengths, counts, overlaps."""
    from finetune.config import load_config
    from finetune.recipes.inspecting import inspect_data

    inspect_data(load_config(config, overrides or ()), examples=examples)


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """Estimate memory and time before a run, and say what to change if it does not fit."""
    from finetune.config import load_config
    from finetune.recipes.planning import plan_run

    plan_run(load_config(config, overrides or ()))


Trials = Annotated[
    int,
    typer.Option(
        min=1, help="Learning rates, half a decade apart; of 3 or more, others if an end is best."
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Optimizer steps of each run.  [default: training.max_steps]",
        show_default=False,
    ),
]


@app.command()
def compare(
    config: Config,
    overrides: Overrides = None,
    trials: Trials = 5,
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Fresh seeds to run each optimizer with at its best learning rate."
        ),
    ] = 5,
    budget: Budget = None,
) -> None:
    """Compare the optimizers of a list (optimizer.name), each at its own best learning rate, over several seeds.

    Writes comparison.html, .json and .csv to runs/compare-CONFIG (or output_dir=...). The same command goes on after a stop.
    """
    from finetune.recipes.comparing import compare_optimizers

    if (
        compare_optimizers(config, overrides or (), trials=trials, seeds=seeds, budget=budget)
        == "signal"
    ):
        raise typer.Exit(130)


@app.command()
def tune(
    config: Config, overrides: Overrides = None, trials: Trials = 5, budget: Budget = None
) -> None:
    """Search the learning rate and the weight decay of CONFIG's optimizer and write best.yaml.

    Each weight decay (optimizer.weight_decay=[...], default 0, 0.01 and 0.1) is tried with as many learning rates as --trials says.
    """
    from finetune.recipes.tuning import tune_optimizer

    if tune_optimizer(config, overrides or (), trials=trials, budget=budget) == "signal":
        raise typer.Exit(130)


@app.command()
def evaluate(
    target: Target,
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(help="What to evaluate on; for a run, its own config.", show_default=False),
    ] = None,
) -> None:
    """Loss, perplexity, bits per byte on data.test (else on the held-out rows); for translation chrF and BLEU. Prints JSON."""
    from finetune.recipes.reading import evaluate_target

    evaluate_target(target, config=config, overrides=overrides or ())


@app.command()
def generate(
    target: Target,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt; may be repeated. Without it, one prompt a line of stdin."),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="Continue the text as it stands instead of answering it in the chat template.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: prompt and answer.")
    ] = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
) -> None:
    """Answer prompts, in batches; where several are given, each answer under its prompt."""
    import json

    from finetune.recipes.answering import generate_answers

    settings = _given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
    )
    for asked, answer in generate_answers(
        target, prompt or [], raw=raw, seed=seed, settings=settings
    ):
        plain = f"> {asked}\n{answer}\n" if prompt and len(prompt) > 1 else answer
        typer.echo(
            json.dumps({"prompt": asked, "answer": answer}, ensure_ascii=False)
            if as_json
            else plain
        )


@app.command()
def chat(
    target: Target,
    system: Annotated[str | None, typer.Option(help="A system prompt.", show_default=False)] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
) -> None:
    """Talk with a model in the terminal: /reset forgets the conversation, /exit ends it."""
    from finetune.recipes.answering import chat_in_terminal

    settings = _given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
    )
    chat_in_terminal(target, system_prompt=system, seed=seed, settings=settings)


@app.command()
def translate(
    target: Target,
    text: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT", help="Sentences; without them and without --input, lines of stdin."
        ),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="A text file, one sentence a line.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write the translations.", show_default=False),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="Source language, e.g. en; for a run, its own.", show_default=False
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", help="Target language, e.g. fr; for a run, its own.", show_default=False
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Translate sentences, stdin, or a file to a file, in batches."""
    from finetune.recipes.translating import translate_text

    translate_text(
        target,
        text or [],
        input=input,
        output=output,
        source=source,
        to=to,
        settings=_given(max_new_tokens=max_new_tokens),
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
) -> None:
    """Write RUN/report.html again from the run's files."""
    from finetune.report import write_report

    typer.echo(write_report(run))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    dest: Annotated[
        Path,
        typer.Argument(
            metavar="DEST", help="The folder to write; it must not exist.", show_default=False
        ),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the exported weights.")
    ] = "float32",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Export this checkpoint instead of model/.", show_default=False),
    ] = None,
) -> None:
    """Write a run's model as a plain Hugging Face folder, reload it, and compare the logits."""
    from finetune.recipes.exporting import export_run

    export_run(run, dest, dtype=dtype, checkpoint=checkpoint)


@app.command()
def optimizers(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Only names like this, e.g. 'ada*'.")
    ] = "*",
) -> None:
    """The optimizers that optimizer.name may be, and what each takes."""
    from finetune.recipes.listing import print_optimizers

    print_optimizers(pattern)


@app.command()
def landscape(
    functions: Annotated[
        str, typer.Option(help="Which, by comma.")
    ] = "beale,rosenbrock,rastrigin,valley,saddle",
    optimizers: Annotated[
        str, typer.Option(help="Up to 7 names, by comma.")
    ] = "sgd,momentum,nesterov,adagrad,rmsprop,adam",
    steps: Annotated[int, typer.Option(help="Of each optimizer.")] = 300,
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("landscapes"),
) -> None:
    """Draw optimizers on the classic functions of two variables, at default and at tuned learning rates; SVG, also animated."""
    from finetune.landscape import draw_landscapes

    names = [
        [name.strip() for name in given.split(",") if name.strip()]
        for given in (functions, optimizers)
    ]
    for path in draw_landscapes(
        output, functions=names[0], optimizers=names[1], steps=steps, said=typer.echo
    ):
        typer.echo(path)


def _given(**settings: float | int | None) -> dict[str, float | int]:
    return {key: value for key, value in settings.items() if value is not None}


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


def main() -> None:
    """Run the command line; the entry point of `finetune` and `python -m finetune`."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="finetune", standalone_mode=False))
    except Exception as error:
        if (said := _sentence(error)) is None:
            raise
        typer.echo(f"finetune: {said}", err=True)
        sys.exit(2)
