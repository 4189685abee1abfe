"""`finetune compare`: optimizers on one config, each at its best learning rate, over several seeds."""

import json
from collections.abc import Sequence
from pathlib import Path

from finetune.comparison.runs import Run
from finetune.comparison.summary import summarise
from finetune.config import load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.compare.candidates import (
    DEFAULT,
    candidates,
    check_candidates,
    section_for,
    take_list,
)
from finetune.recipes.compare.data import rule
from finetune.recipes.compare.outcome import conclude
from finetune.recipes.compare.study import best_of, prepare_study, said, stopped, tune
from finetune.recipes.compare.trial import run_trial
from finetune.training.trainer import Stopped


def compare_optimizers(
    path: Path,
    overrides: Sequence[str],
    *,
    trials: int,
    seeds: int,
    budget: int | None,
    display: Display | None = None,
) -> Stopped:
    """Tune each optimizer's learning rate with `trials` runs, run the best with `seeds` fresh seeds, and write the comparison.

    Raises UserError for anything wrong with config or optimizers, or a folder that holds another comparison.
    """
    display = display or Display()
    names, others = take_list(overrides, "optimizer.name")
    config = load_config(
        path, [f"output_dir={json.dumps(str(Path('runs') / f'compare-{path.stem}'))}", *others]
    )
    optimizers = candidates(DEFAULT if names is None else names)
    notes = check_candidates(config, optimizers)
    base = prepare_study(config, trials=trials, budget=budget, test=True, display=display)
    display.say(
        f"{len(optimizers)} optimizers x ({trials} learning rates + {seeds} seeds), in {config.output_dir}"
    )
    tuning: dict[str, list[Run]] = {}
    for name in optimizers:
        found = tune(base, name, trials=trials, decays=(), display=display)
        if found is None:
            return stopped(config, display)
        tuning[name] = found
    reported: dict[str, list[Run]] = {name: [] for name in optimizers}
    for seed in range(
        base.seed + 1, base.seed + 1 + seeds
    ):  # seed by seed, so that a drift of the machine meets all alike
        for name in optimizers:
            lr = best_of(tuning[name]).result.lr
            section = section_for(base.optimizer, name, lr=lr)
            folder = config.output_dir / "runs" / name / f"seed-{seed}"
            trial = base.model_copy(
                update={"optimizer": section, "seed": seed, "output_dir": folder}
            )
            run = run_trial(trial, phase="reported", display=display)
            if run is None:
                return stopped(config, display)
            reported[name].append(run)
            display.say(f"{name}, lr {lr:g}, seed {seed}: {said(run)}")
    _check_starts(reported, config.output_dir)
    summary = summarise(tuning, reported, grid_size=trials)
    page = conclude(summary, base, rule=rule(config.data), trials=trials, seeds=seeds, notes=notes)
    for sentence in summary["verdict"]["sentences"]:
        display.say(sentence)
    display.say(f"comparison: {page}")
    return "finished"


def _check_starts(reported: dict[str, list[Run]], root: Path) -> None:
    """Raise UserError unless for each seed all optimizers began with the same weights and the same data."""
    for alike in zip(*reported.values()):
        if any(run.result.start != alike[0].result.start for run in alike):
            raise UserError(
                f"in {root} the runs of seed {alike[0].result.seed} did not begin with the same weights and data, so something "
                "changed since the comparison was begun: delete the folder and start again"
            )
