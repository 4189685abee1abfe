"""`finetune train`, `demo`, `inspect` and `plan`: a run, and what comes before it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.cli.app import STOPPED, Config, Overrides, app, require_stdout, say_start


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Continue a run: auto (its newest complete checkpoint), or the folder of a "
            "checkpoint or of a run."
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
        typer.Option(help="Number of processes on this machine, or auto (one for each GPU)."),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(min=0, max=1000, help="How often to start again after a process has died."),
    ] = 0,
) -> None:
    """Fine-tune a model with the settings in CONFIG.

    The run's folder is output_dir, by default runs/ and the name of CONFIG.
    """
    from finetune.config import load_config
    from finetune.display import Display
    from finetune.recipes.build.look import look_at, look_at_start

    settings = load_config(config, overrides or ())
    look_at(settings)
    require_stdout() if dry_run else look_at_start(settings, resume)
    say_start()
    display = Display()
    if processes is None and not restarts:
        from finetune.recipes.train.train import run_training

        stopped = run_training(settings, resume=resume, dry_run=dry_run, display=display)
    else:
        from finetune.recipes.train.launch import ProcessFailed, launch_training

        try:
            stopped = launch_training(
                config,
                overrides or (),
                processes=processes or "1",
                restarts=restarts,
                resume=resume,
                dry_run=dry_run,
                display=display,
            )
        except ProcessFailed as error:
            typer.echo(f"finetune: {error}", err=True)
            raise typer.Exit(1) from None
    if stopped == "signal":
        raise typer.Exit(STOPPED)
    if not dry_run:
        from finetune.recipes.build.card import how_to_try
        from finetune.recipes.train.samples import say_samples
        from finetune.run.folder import RunDir

        run = RunDir(settings.output_dir)
        say_samples(run, display)
        display.say(f"\nTry the model:    {how_to_try(run)}")


@app.command()
def demo(
    task: Annotated[
        Literal["chat", "translation"],
        typer.Argument(metavar="chat|translation", help="The task to learn."),
    ],
    overrides: Overrides = None,
    short: Annotated[
        bool, typer.Option("--short", help="Take a few steps only, to see that everything works.")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="The run's folder.", show_default="runs/demo-TASK")
    ] = None,
) -> None:
    """Fine-tune SmolLM2-135M on the data in the package, on a laptop's CPU."""
    from finetune.recipes.demo import demo_config, run_demo

    settings = demo_config(task, overrides or (), short=short, output_dir=output_dir)
    say_start()
    if run_demo(settings) == "signal":
        raise typer.Exit(STOPPED)


@app.command()
def inspect(
    config: Config,
    overrides: Overrides = None,
    examples: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Number of examples to print.")
    ] = 3,
) -> None:
    """Show the data as the model sees it, with lengths, counts and overlaps.

    The target text of each example is coloured.
    """
    require_stdout()
    from finetune.config import load_config
    from finetune.recipes.build.look import look_at

    settings = load_config(config, overrides or ())
    look_at(settings)
    say_start()
    from finetune.recipes.inspect import inspect_data

    inspect_data(settings, examples=examples)


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """Estimate the memory and time of a run, and suggest changes if it does not fit."""
    require_stdout()
    from finetune.config import load_config
    from finetune.recipes.build.look import look_at

    settings = load_config(config, overrides or ())
    look_at(settings)
    say_start()
    from finetune.recipes.plan.plan import plan_run

    plan_run(settings)
