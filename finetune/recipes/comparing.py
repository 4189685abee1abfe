"""`finetune compare`: optimizers on one config, each at its best learning rate, over several seeds.

Floor 5. The runs are the trainer's own, each in a folder; what was run is not run again, so the same command goes on after a stop,
and with more seeds or optimizers adds to what is there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.comparison import grids
from finetune.comparison.runs import Run
from finetune.comparison.summary import summarise
from finetune.config import RunConfig, dump_config, load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.candidates import (
    DEFAULT,
    candidates,
    check_candidates,
    section_for,
    take_list,
)
from finetune.recipes.concluding import conclude
from finetune.recipes.holding_out import hold_out, rule
from finetune.recipes.parts import make_accelerator
from finetune.recipes.searching import search
from finetune.recipes.trials import run_trial
from finetune.run.files import write_text
from finetune.run.folder import RunDir
from finetune.trainer import Stopped

EVALUATIONS = 10  # of a run, where evaluation.every does not say


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
    base = prepare(config, trials=trials, budget=budget, test=True, display=display)
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


def prepare(
    config: RunConfig, *, trials: int, budget: int | None, test: bool, display: Display
) -> RunConfig:
    """The config that every run is made from, and its data in files. Raises UserError where another comparison is in the folder."""
    if make_accelerator(config, Display(enabled=False)).num_processes > 1:
        raise UserError(
            "comparing and tuning run in one process; start them without `accelerate launch`"
        )
    steps = budget if budget is not None else config.training.max_steps
    if steps is None:
        raise UserError(
            "a comparison needs a length that is the same for all: give --budget STEPS, or set training.max_steps"
        )
    _claim(config, {"trials": trials, "budget": steps})
    every = config.evaluation.every or max(1, steps // EVALUATIONS)
    loss_alone = {
        "metrics": (),
        "generate": 0,
        "samples": 0,
        "best": "loss",
        "early_stopping_patience": None,
    }
    data = hold_out(config.data, seed=config.seed, folder=config.output_dir / "data", test=test)
    return config.model_copy(
        update={
            "overwrite_output_dir": False,
            "data": data,
            "training": config.training.model_copy(update={"max_steps": steps}),
            "evaluation": config.evaluation.model_copy(
                update={"every": every, "before": True, **loss_alone}
            ),
            "checkpoint": config.checkpoint.model_copy(
                update={"keep": 1, "save_best_model": False}
            ),
            "tracking": (),
        }
    )


def tune(
    base: RunConfig,
    name: str,
    *,
    trials: int,
    decays: Sequence[float],
    display: Display,
    middle: float | None = None,
) -> list[Run] | None:
    """Run the grid of one optimizer with the config's seed, widened where that is called for; None where a signal came."""
    start = (
        "lora"
        if base.model.lora is not None
        else "random"
        if base.model.name is None
        else "pretrained"
    )
    lrs = grids.lr_grid(grids.centre(name, start) if middle is None else middle, trials)
    said_before: set[str] = set()

    def try_out(point: dict[str, float]) -> Run | None:
        place = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in point.items())
        folder = base.output_dir / "runs" / name / place.replace(", ", "-").replace(" ", "-")
        trial = base.model_copy(
            update={"optimizer": section_for(base.optimizer, name, **point), "output_dir": folder}
        )
        run = run_trial(trial, phase="tuning", display=display)
        if run is not None and place not in said_before:
            said_before.add(place)
            display.say(f"{name}, {place}{'' if point['lr'] in lrs else ' (widened)'}: {said(run)}")
        return run

    return search(base.output_dir / "study.db", name, lrs, decays, try_out)


def best_of(runs: Sequence[Run]) -> Run:
    """The run with the lowest held-out loss; of equal ones that with the lowest learning rate."""
    return min(runs, key=lambda run: (run.loss, run.result.lr))


def said(run: Run) -> str:
    if run.diverged:
        return f"diverged after {run.steps} steps"
    return f"held-out loss {run.loss:.4f}" + (
        f", test loss {run.test_loss:.4f}" if run.result.test else ""
    )


def stopped(config: RunConfig, display: Display) -> Stopped:
    display.say(
        f"stopped by a signal; the same command goes on with what is in {config.output_dir}"
    )
    return "signal"


def _change(key: str, before: Any, now: Any) -> str:
    return f"in {key}" if isinstance(now, (dict, list)) else f"{key} {before}, now {now}"


def _claim(config: RunConfig, numbers: dict[str, int]) -> None:
    """Make the folder ours, or find that it is. Raises UserError where what must be the same for all runs was another."""
    root = config.output_dir
    same = config.model_copy(update={"output_dir": Path(), "overwrite_output_dir": False})
    tree = {**yaml.safe_load(dump_config(same)), **numbers}
    tree["optimizer"] = {
        key: value for key, value in tree["optimizer"].items() if key not in ("name", "lr")
    }
    path = root / "protocol.yaml"
    if path.is_file():
        then = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = [key for key in tree if then.get(key) != tree[key]]
        if changed:
            said = ", ".join(_change(key, then.get(key), tree[key]) for key in changed)
            raise UserError(
                f"{root} holds a comparison with other settings ({said}; see {path}): name another output_dir, or delete it"
            )
    elif RunDir(root).is_run():
        raise UserError(f"{root} holds a training run: name another output_dir")
    root.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def _check_starts(reported: dict[str, list[Run]], root: Path) -> None:
    """Raise UserError unless for each seed all optimizers began with the same weights and the same data."""
    for alike in zip(*reported.values()):
        if any(run.result.start != alike[0].result.start for run in alike):
            raise UserError(
                f"in {root} the runs of seed {alike[0].result.seed} did not begin with the same weights and data, so something "
                "changed since the comparison was begun: delete the folder and start again"
            )
