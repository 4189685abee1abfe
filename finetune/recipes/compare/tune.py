"""`finetune tune`: the learning rate and the weight decay of one optimizer, on the machinery of `finetune compare`.

Floor 5.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finetune.comparison.grids import WEIGHT_DECAYS
from finetune.comparison.runs import Run
from finetune.config import RunConfig, dump_config, load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.optim import check_optimizer, optimizer_info
from finetune.recipes.build.optimizer import optimizer_options
from finetune.recipes.compare.candidates import check_candidates, section_for, take_list
from finetune.recipes.compare.study import best_of, prepare_study, stopped, tune
from finetune.run.files import write_text
from finetune.training.trainer import Stopped


def tune_optimizer(
    path: Path,
    overrides: Sequence[str],
    *,
    trials: int,
    budget: int | None,
    display: Display | None = None,
) -> Stopped:
    """Try `trials` learning rates, each with every weight decay, print the table, and write the config of the best as best.yaml.

    The grid lies around the config's own learning rate where it gives one; the weight decays are those of an override
    `optimizer.weight_decay=[…]`, else WEIGHT_DECAYS. Raises UserError as `compare_optimizers` does.
    """
    display = display or Display()
    decays, others = take_list(overrides, "optimizer.weight_decay")
    config = load_config(
        path, [f"output_dir={json.dumps(str(Path('runs') / f'tune-{path.stem}'))}", *others]
    )
    name = optimizer_info(config.optimizer.name).name
    tried = [float(decay) for decay in (WEIGHT_DECAYS if decays is None else decays)]
    tried = tried if "weight_decay" in optimizer_info(name).options else []
    check_candidates(config, [name])
    for decay in tried:
        section = section_for(config.optimizer, name, lr=config.optimizer.lr, weight_decay=decay)
        check_optimizer(name, optimizer_options(config.model_copy(update={"optimizer": section})))
    base = prepare_study(config, trials=trials, budget=budget, test=False, display=display)
    middle = config.optimizer.lr if "lr" in config.optimizer.model_fields_set else None
    runs = tune(base, name, trials=trials, decays=tried, display=display, middle=middle)
    if runs is None:
        return stopped(config, display)
    best = best_of(runs)
    if best.diverged:
        raise UserError(
            f"all {len(runs)} runs diverged, the one with the lowest lr of {best.result.lr:g} as well: begin lower"
        )
    chosen = config.output_dir / "best.yaml"
    write_text(chosen, dump_config(_best_config(config, best, budget, path)))
    _print(name, runs, best, trials * max(1, len(tried)))
    display.say(
        f"{name} {said_settings(best)} did best of {len(runs)} runs, with one seed; go on with: finetune train {chosen}"
    )
    return "finished"


def _best_config(config: RunConfig, best: Run, budget: int | None, path: Path) -> RunConfig:
    """The user's config with the learning rate and the weight decay found."""
    found: dict[str, Any] = {
        key: best.result.settings[key]
        for key in ("lr", "weight_decay")
        if key in best.result.settings
    }
    training = (
        config.training
        if budget is None
        else config.training.model_copy(update={"max_steps": budget})
    )
    section = config.optimizer.model_copy(update=found)
    return config.model_copy(
        update={
            "optimizer": section,
            "training": training,
            "output_dir": Path("runs") / f"{path.stem}-tuned",
        }
    )


def said_settings(run: Run) -> str:
    decay: Any = run.result.settings.get("weight_decay")
    return f"lr={run.result.lr:g}" + ("" if decay is None else f" weight_decay={decay:g}")


def _print(name: str, runs: Sequence[Run], best: Run, planned: int) -> None:
    table = Table(
        title=f"{name}: held-out loss after {best.points[-1].step} steps", title_justify="left"
    )
    for label in ("lr", "weight decay", "loss", ""):
        table.add_column(label, justify="right" if label else "left")
    for number, run in sorted(
        enumerate(runs),
        key=lambda item: (item[1].result.lr, item[1].result.settings.get("weight_decay") or 0),
    ):
        marks = [*(["best"] if run is best else []), *(["widened"] if number >= planned else [])]
        decay = run.result.settings.get("weight_decay")
        loss = "diverged" if run.diverged else f"{run.loss:.4f}"
        table.add_row(
            f"{run.result.lr:g}", "–" if decay is None else f"{decay:g}", loss, ", ".join(marks)
        )
    Console(highlight=False).print(table)
