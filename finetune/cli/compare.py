"""`finetune compare`, `tune`, `optimizers` and `landscape`: the choice of an optimizer."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.app import STOPPED, Config, Overrides, app, require_stdout, say_start

Trials = Annotated[
    int,
    typer.Option(
        min=1,
        max=1000,
        help="Number of learning rates to try, spaced by a factor of about 3. With 3 or more, the "
        "grid is extended if the best one is at its edge.",
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1_000_000_000,
        help="Optimizer steps of each run.",
        show_default="as many as `finetune train` takes",
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
            min=1,
            max=1000,
            help="Number of fresh seeds for each optimizer at its best learning rate.",
        ),
    ] = 5,
    budget: Budget = None,
) -> None:
    """Compare optimizers, each at its own best learning rate, over several seeds.

    Name them with optimizer.name=[A,B].
    The results are comparison.html, .json and .csv in runs/compare-CONFIG (or output_dir=...).
    After a stop, the same command continues.
    """
    require_stdout()
    from finetune.recipes.build.look import look_at_search

    look_at_search(config, overrides or (), key="optimizer.name")
    say_start()
    from finetune.recipes.compare.compare import compare_optimizers

    if (
        compare_optimizers(config, overrides or (), trials=trials, seeds=seeds, budget=budget)
        == "signal"
    ):
        raise typer.Exit(STOPPED)


@app.command()
def tune(
    config: Config, overrides: Overrides = None, trials: Trials = 5, budget: Budget = None
) -> None:
    """Search the learning rate and weight decay of CONFIG's optimizer, and write best.yaml.

    optimizer.weight_decay=[A,B] names the weight decays; the default is 0, 0.01 and 0.1.
    Each of them is tried with --trials learning rates.
    After a stop, the same command continues.
    """
    require_stdout()
    from finetune.recipes.build.look import look_at_search

    look_at_search(config, overrides or (), key="optimizer.weight_decay")
    say_start()
    from finetune.recipes.compare.tune import tune_optimizer

    if tune_optimizer(config, overrides or (), trials=trials, budget=budget) == "signal":
        raise typer.Exit(STOPPED)


@app.command()
def optimizers(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Only names that match, e.g. 'ada*'.")
    ] = "*",
) -> None:
    """List the available optimizers and their options."""
    require_stdout()
    from finetune.recipes.optimizers import print_optimizers

    print_optimizers(pattern)


@app.command()
def landscape(
    functions: Annotated[
        str, typer.Option(help="Comma-separated names of functions.")
    ] = "beale,rosenbrock,rastrigin,valley,saddle",
    optimizers: Annotated[
        str, typer.Option(help="Comma-separated names of optimizers, at most 7.")
    ] = "sgd,momentum,nesterov,adagrad,rmsprop,adam",
    steps: Annotated[int, typer.Option(help="Steps per optimizer.")] = 300,
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("landscapes"),
) -> None:
    """Draw the paths of optimizers on classic functions of two variables.

    Each optimizer runs at its default and at a tuned learning rate.
    The pictures are SVG files, some of them animated.
    """
    from finetune.optim.registry import optimizer_info

    names = [
        [name.strip() for name in given.split(",") if name.strip()]
        for given in (functions, optimizers)
    ]
    for name in names[1]:
        optimizer_info(name)
    say_start()
    from finetune.landscape import draw_landscapes

    for path in draw_landscapes(
        output, functions=names[0], optimizers=names[1], steps=steps, say=typer.echo
    ):
        typer.echo(path)
