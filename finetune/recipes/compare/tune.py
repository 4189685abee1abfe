"""`finetune tune`: the best learning rate and weight decay of one optimizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from rich.table import Table

from finetune.comparison.grids import WEIGHT_DECAYS
from finetune.config import RunConfig, dump_config, load_config
from finetune.display import Display, on_terminal, plain_console
from finetune.errors import UserError
from finetune.optim import check_optimizer, optimizer_info
from finetune.recipes.build.look import take_list
from finetune.recipes.build.optimizer import may_be_lazy, optimizer_options
from finetune.recipes.compare.candidates import check_candidates, section_for
from finetune.recipes.compare.study import (
    best_of,
    prepare_study,
    report_stop,
    tune_learning_rate,
)
from finetune.recipes.compare.trial import Tally
from finetune.run.claim import locked
from finetune.run.files import write_text
from finetune.run.trials import Run
from finetune.training.trainer import Stopped


def tune_optimizer(
    path: Path,
    overrides: Sequence[str],
    *,
    trials: int,
    budget: int | None,
    display: Display | None = None,
) -> Stopped:
    """Search the config's optimizer, print a table, and write the best config to best.yaml.

    `trials` learning rates are tried, each with every weight decay. They are around the config's
    own learning rate, if it gives one. The weight decays are those of an override
    `optimizer.weight_decay=[…]`, by default WEIGHT_DECAYS. Raises UserError as
    `compare_optimizers` does, and if every run diverged.
    """
    display = display or Display()
    given, others = take_list(overrides, "optimizer.weight_decay")
    folder = f"output_dir={json.dumps(str(Path('runs') / f'tune-{path.stem}'))}"
    config = load_config(path, [folder, *others])
    name = optimizer_info(config.optimizer.name).name
    if given is not None and "weight_decay" not in optimizer_info(name).options:
        raise UserError(f"{name} takes no weight decay. Leave optimizer.weight_decay out")
    decays = _check_decays(config, name, WEIGHT_DECAYS if given is None else given)
    if given is None and decays and "weight_decay" in config.optimizer.model_fields_set:
        display.note(
            "optimizer.weight_decay of the config has no effect here. Name those to try in the "
            "command: optimizer.weight_decay=[A,B]"
        )
    with locked(config.output_dir, display.note):
        base = prepare_study(config, trials=trials, budget=budget, test=False, display=display)
        middle = config.optimizer.lr if "lr" in config.optimizer.model_fields_set else None
        runs = tune_learning_rate(
            base,
            name,
            trials=trials,
            decays=decays,
            display=display,
            middle=middle,
            tally=Tally(trials * max(1, len(decays))),
        )
        if runs is None:
            return report_stop(config, display)
        best = best_of(runs)
        if best.diverged:
            raise UserError(
                f"all {len(runs)} runs diverged, also the one with the lowest lr, "
                f"{best.result.lr:g}. Begin with a lower optimizer.lr"
            )
        chosen = config.output_dir / "best.yaml"
        write_text(chosen, dump_config(_best_config(config, best, path)))
        _print_runs(name, runs, best, trials * max(1, len(decays)))
        found = f"the best of {len(runs)} runs with one seed: {name} {settings_in_words(best)}"
        print(on_terminal(f"{found}. Go on with: finetune train {quote(str(chosen))}"))
        return "finished"


def _check_decays(config: RunConfig, name: str, decays: Sequence[Any]) -> list[float]:
    """Return the weight decays to try, none if the optimizer takes none.

    Raises UserError for a value that is no number or that the optimizer refuses.
    """
    try:
        tried = [float(decay) for decay in decays]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optimizer.weight_decay={decays} does not hold numbers alone. "
            "Give a list of numbers, such as [0, 0.1]"
        ) from error
    tried = tried if "weight_decay" in optimizer_info(name).options else []
    check_candidates(config, [name])
    for decay in tried:
        section = section_for(config.optimizer, name, lr=config.optimizer.lr, weight_decay=decay)
        changed = config.model_copy(update={"optimizer": section})
        check_optimizer(name, optimizer_options(changed))
        may_be_lazy(changed)
    return tried


def _best_config(config: RunConfig, best: Run, path: Path) -> RunConfig:
    """Return the user's config with the best learning rate and weight decay."""
    found: dict[str, Any] = {
        key: best.result.settings[key]
        for key in ("lr", "weight_decay")
        if key in best.result.settings
    }
    return config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update=found),
            "output_dir": Path("runs") / f"{path.stem}-tuned",
        }
    )


def settings_in_words(run: Run) -> str:
    """Return the learning rate of a run, and its weight decay if it has one."""
    decay = run.result.settings.get("weight_decay")
    return f"lr={run.result.lr:g}" + ("" if decay is None else f" weight_decay={decay:g}")


def _print_runs(name: str, runs: Sequence[Run], best: Run, planned: int) -> None:
    """Print a table of the runs by learning rate; the first `planned` of them are the grid's."""
    title = f"{name}: held-out loss after {best.points[-1].step} steps"
    table = Table(title=title, title_justify="left")
    for label in ("lr", "weight decay", "loss", ""):
        table.add_column(label, justify="right" if label else "left")

    def order(item: tuple[int, Run]) -> tuple[float, float]:
        result = item[1].result
        return result.lr, result.settings.get("weight_decay") or 0

    for number, run in sorted(enumerate(runs), key=order):
        marks = [*(["best"] if run is best else []), *(["widened"] if number >= planned else [])]
        decay = run.result.settings.get("weight_decay")
        shown = "–" if decay is None else f"{decay:g}"
        loss = "diverged" if run.diverged else f"{run.loss:.4f}"
        table.add_row(f"{run.result.lr:g}", shown, loss, ", ".join(marks))
    plain_console().print(table)
