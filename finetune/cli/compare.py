"""`finetune compare`, `tune`, `optimizers` and `landscape`: which optimizer, and at which rate."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.app import STOPPED, Config, Overrides, app

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
    """Search the learning rate and the weight decay of CONFIG's optimizer and write best.yaml.

    Each weight decay (optimizer.weight_decay=[...], default 0, 0.01 and 0.1) is tried with as many learning rates as --trials says.
    """
    from finetune.recipes.compare.tune import tune_optimizer

    if tune_optimizer(config, overrides or (), trials=trials, budget=budget) == "signal":
        raise typer.Exit(STOPPED)


@app.command()
def optimizers(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Only names like this, e.g. 'ada*'.")
    ] = "*",
) -> None:
    """The optimizers that optimizer.name may be, and what each takes."""
    from finetune.recipes.optimizers import print_optimizers

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
        output, functions=names[0], optimizers=names[1], steps=steps, say=typer.echo
    ):
        typer.echo(path)
