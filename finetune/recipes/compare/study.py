"""What `finetune compare` and `finetune tune` share: the protocol of a study, and the search for a learning rate.

The runs are the trainer's own, each in a folder. What was run is not run again, so the same command
goes on after a stop, and with more seeds or optimizers adds to what is there. optuna keeps the book
of a search, the runs keep their results. Grid points are optuna's `GridSampler`'s
(https://optuna.readthedocs.io). Its study is in SQLite, so `optuna-dashboard` can read it.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from finetune.comparison import grids
from finetune.comparison.grids import MAX_WIDENINGS, wider
from finetune.comparison.runs import Run
from finetune.config import RunConfig, dump_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.build.accelerator import make_accelerator
from finetune.recipes.compare.candidates import (
    section_for,
)
from finetune.recipes.compare.data import hold_out
from finetune.recipes.compare.trial import run_trial
from finetune.run.files import write_text
from finetune.run.folder import RunDir
from finetune.training.trainer import Stopped

EVALUATIONS = 10  # of a run, where evaluation.every does not say


Space = dict[str, list[float]]


def prepare_study(
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


def search(
    book: Path,
    name: str,
    lrs: Sequence[float],
    decays: Sequence[float],
    try_out: Callable[[dict[str, float]], Run | None],
) -> list[Run] | None:
    """Every point of the grid, `lrs` times `decays` (none: the learning rate alone), then those by which it had to be widened.

    `try_out` runs one point, {"lr": …, "weight_decay": …}, or reads it where it was run before; None means that a signal came, and
    so does None here. The first `len(lrs) * max(1, len(decays))` runs are the grid's.
    """
    runs: list[Run] = []
    lrs, widened = list(lrs), 0
    with _study(book, name) as study:
        while True:
            space = {"lr": lrs, **({"weight_decay": list(decays)} if decays else {})}
            if not _exhaust(study, space, try_out):
                return None
            found = [
                try_out(dict(zip(space, point))) for point in itertools.product(*space.values())
            ]
            assert all(found), "every point of the grid was run"
            runs += [run for run in found if run is not None]
            losses: dict[float, float] = {}
            for run in runs:
                losses[run.result.lr] = min(run.loss, losses.get(run.result.lr, math.inf))
            further = wider(losses)
            if further is None or widened == MAX_WIDENINGS:
                return runs
            lrs, widened = [further], widened + 1


def _exhaust(study: Any, space: Space, try_out: Callable[[dict[str, float]], Run | None]) -> bool:
    """Run what is left of the grid; False where a signal came."""
    import optuna

    anything = optuna.distributions.FloatDistribution(
        0.0, sys.float_info.max
    )  # a grid's values are given, not drawn
    sampler = study.sampler = optuna.samplers.GridSampler(space, seed=0)
    sampler.after_trial = lambda *_: None  # type: ignore[method-assign]  # it would stop optuna's loop, and this one is ours
    while (trial := _begun(study, space)) is not None or not sampler.is_exhausted(study):
        if trial is None:
            study.ask(dict.fromkeys(space, anything))
            continue
        point = {key: sampler.sample_independent(study, trial, key, anything) for key in space}
        run = try_out(point)
        if run is None:
            return False
        study.tell(trial.number, run.loss)
    return True


def _begun(study: Any, space: Space) -> Any:
    """The trial that is begun and not over, of this process or of one that was killed."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "search_space" not in trial.system_attrs:  # killed before it was known which point it is
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.system_attrs["search_space"] == space:
            return trial
    return None


@contextmanager
def _study(book: Path, name: str) -> Iterator[Any]:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "comparing and tuning need optuna, which is not installed: pip install 'finetune-rows[compare]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{book}")
    try:
        yield optuna.create_study(
            storage=storage, study_name=name, load_if_exists=True, direction="minimize"
        )
    finally:
        storage.remove_session()
        storage.engine.dispose()
