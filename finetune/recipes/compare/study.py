"""What `finetune compare` and `finetune tune` share: the protocol, and the search for a rate.

Each run is one of the trainer's own, in a folder of its own, and is not run twice. So the same
command goes on after a stop, and with more seeds or optimizers it adds to what is there. The points
of the grid are those of optuna's GridSampler (https://optuna.readthedocs.io). optuna keeps them in
SQLite, so `optuna-dashboard` can read the search.
"""

import itertools
import math
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from finetune.comparison import grids
from finetune.comparison.grids import MAX_WIDENINGS, wider
from finetune.config import RunConfig, dump_config
from finetune.config.values import HIGHEST_RATE
from finetune.config.yaml12 import parse
from finetune.display import Display
from finetune.errors import Border, UserError, reason_of
from finetune.recipes.build.accelerator import make_accelerator
from finetune.recipes.build.material import read_material, with_template_date
from finetune.recipes.build.parts import EVALUATIONS, assemble
from finetune.recipes.build.size import batch_size_of, step_size_in_words
from finetune.recipes.compare.candidates import section_for
from finetune.recipes.compare.data import hold_out
from finetune.recipes.compare.trial import Tally, run_trial
from finetune.recipes.train.start import flat_settings
from finetune.run.claim import claim_folder
from finetune.run.files import read_text, write_text
from finetune.run.trials import Run
from finetune.run.wording import counted, listed
from finetune.training.trainer import Stopped

PROTOCOL = "protocol.yaml"
"""What the runs of a folder have in common: their settings, and what was found of the data."""

NAMES = (  # what a comparison or a search writes into its folder
    *(PROTOCOL, "study.db", "data", "runs", "best.yaml"),
    *("comparison.json", "comparison.csv", "comparison.html"),
)

Grid = dict[str, list[float]]  # "lr", and "weight_decay" if it is searched too
GridPoint = dict[str, float]


def prepare_study(
    config: RunConfig, *, trials: int, budget: int | None, test: bool, display: Display
) -> RunConfig:
    """Return the config that every run is made from, with its data written to files.

    `budget`: optimizer steps of each run; None: those of the config's own run. `test`: hold test
    data out too. Raises UserError for a config that cannot be compared, or a folder of another
    comparison.
    """
    quiet = Display(enabled=False)
    accelerator = make_accelerator(config, quiet)
    if accelerator.num_processes > 1:
        raise UserError(
            "comparing and tuning run in one process. Start them without `accelerate launch`"
        )
    if config.training.max_time is not None:
        raise UserError(
            "training.max_time would give each run another number of steps. Leave it out, or set "
            "training.max_steps instead"
        )
    root = config.output_dir
    claim_folder(root, "comparison", [root / name for name in NAMES])
    begun = any(root.glob("runs/*/*/metrics.jsonl"))  # else nothing is lost by another beginning
    if begun and config.overwrite_output_dir:
        raise UserError(
            f"overwrite_output_dir deletes a run, and {root} holds a comparison, which goes on. "
            "Leave it out, delete the folder, or name another output_dir"
        )
    before = _read_protocol(root / PROTOCOL) if begun else {}
    given = {**_settings_of(config), "trials": trials}
    _refuse_changes(root, before, given)
    if (kept := before.get("template_date")) is not None:
        config = with_template_date(config, date.fromisoformat(kept))
    data = hold_out(config.data, seed=config.seed, folder=root / "data", test=test, again=not begun)
    held_out = config.model_copy(update={"data": data})
    parts = assemble(read_material(held_out, quiet), accelerator=accelerator, display=quiet)
    steps = budget or parts.num_steps
    day = parts.config.data.template_date
    found = {
        "steps": steps,
        "batch_size": batch_size_of(parts.config),
        "template_date": None if day is None else day.isoformat(),
        "the training data": parts.identity["the training data"][:8],
    }
    _refuse_changes(root, before, found)
    write_text(root / PROTOCOL, yaml.safe_dump(given | found, sort_keys=False, allow_unicode=True))
    if (sentence := step_size_in_words(config, parts.config)) is not None:
        display.say(sentence)
    base = _config_of_runs(parts.config, steps)
    if keys := _without_effect(config, base):
        have = "have" if len(keys) > 1 else "has"
        display.note(
            f"{listed(keys)} {have} no effect here: nothing is generated, tracked or kept, and the "
            "held-out loss alone decides"
        )
    display.say(f"every run has {counted(steps, 'step')}, and the loss after the last one decides")
    return base


def _config_of_runs(config: RunConfig, steps: int) -> RunConfig:
    """Return the config of the runs: of `steps` steps, and evaluated by the loss alone."""
    loss_alone = {
        "metrics": (),
        "generate": 0,
        "samples": 0,
        "best": "loss",
        "early_stopping_patience": None,
    }
    every = config.evaluation.every or max(1, steps // EVALUATIONS)
    return config.model_copy(
        update={
            "overwrite_output_dir": False,
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


def _without_effect(config: RunConfig, base: RunConfig) -> list[str]:
    """Return the settings of the user, other than the defaults, that no run follows."""
    asked = flat_settings(config.model_dump(mode="json", exclude_defaults=True))
    done = flat_settings(base.model_dump(mode="json"))
    parts = ("evaluation.", "checkpoint.", "tracking")
    found = [key for key in asked if key.startswith(parts) and done[key] != asked[key]]
    return [*found, *(key for key in asked if key.startswith("generation."))]


def _settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that all runs of a folder have in common."""
    same = config.model_copy(update={"output_dir": Path(), "overwrite_output_dir": False})
    tree = parse(dump_config(same))
    tree["optimizer"] = {
        key: value for key, value in tree["optimizer"].items() if key not in ("name", "lr")
    }
    return dict(tree)


def _refuse_changes(root: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError if `now` differs from what the runs in `root` were begun with."""
    changed = [
        _change(key, before[key], now[key]) for key in now if before.get(key, now[key]) != now[key]
    ]
    if changed:
        raise UserError(
            f"{root} holds a comparison with other settings ({', '.join(changed)}; "
            f"see {root / PROTOCOL}). Name another output_dir, or delete the folder"
        )


def _read_protocol(path: Path) -> dict[str, Any]:
    """Return what protocol.yaml holds. Raises UserError if it cannot be read."""
    text = read_text(path)
    try:
        found = parse(text)
        date.fromisoformat((found or {}).get("template_date") or "2000-01-01")
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{path} is damaged, so the settings of the comparison are not known. "
            f"Name another output_dir, or delete {path.parent}"
        )
    return found


def _change(key: str, before: Any, now: Any) -> str:
    return f"in {key}" if isinstance(now, (dict, list)) else f"{key} {before}, now {now}"


def tune_learning_rate(
    base: RunConfig,
    name: str,
    *,
    trials: int,
    decays: Sequence[float],
    display: Display,
    tally: Tally,
    middle: float | None = None,
) -> list[Run] | None:
    """Run the grid of optimizer `name` with the config's seed; return None if a signal stopped it.

    The grid has `trials` learning rates around `middle`, by default around `grids.centre`, and each
    of the weight decays. It is widened if the best is at one of its ends.
    """
    start = "pretrained"
    if base.model.lora is not None:
        start = "lora"
    elif base.model.name is None:
        start = "random"
    middle = grids.centre(name, start) if middle is None else middle
    lrs = grids.lr_grid(middle, trials, highest=HIGHEST_RATE)
    reported: set[str] = set()

    def run_point(point: GridPoint) -> Run | None:
        place = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in point.items())
        folder = base.output_dir / "runs" / name / place.replace(", ", "-").replace(" ", "-")
        section = section_for(base.optimizer, name, **point)
        trial = base.model_copy(update={"optimizer": section, "output_dir": folder})
        run = run_trial(trial, phase="tuning", display=display, tally=tally)
        if run is not None and place not in reported:
            reported.add(place)
            widened = "" if point["lr"] in lrs else " (widened)"
            display.say(f"{name}, {place}{widened}: {outcome_in_words(run)}")
        return run

    return search(base.output_dir / "study.db", name, lrs, decays, run_point)


def best_of(runs: Sequence[Run]) -> Run:
    """Return the run with the lowest held-out loss; of equal ones, the lowest learning rate."""
    return min(runs, key=lambda run: (run.loss, run.result.lr))


def outcome_in_words(run: Run) -> str:
    """Return the losses of a run, or when it diverged."""
    if run.diverged:
        return f"diverged after {run.steps} steps"
    test = f", test loss {run.test_loss:.4f}" if run.result.test else ""
    return f"held-out loss {run.loss:.4f}{test}"


def report_stop(config: RunConfig, display: Display) -> Stopped:
    """Print how to go on after a signal, and return why the command stopped."""
    display.say(
        f"stopped by a signal. The same command goes on with what is in {config.output_dir}"
    )
    return "signal"


def search(
    database: Path,
    name: str,
    lrs: Sequence[float],
    decays: Sequence[float],
    run_point: Callable[[GridPoint], Run | None],
) -> list[Run] | None:
    """Return the runs of the grid, then those that widened it; None if a signal came.

    The grid is `lrs` times `decays`, or `lrs` alone without decays. So its runs are the first
    `len(lrs) * max(1, len(decays))`. `run_point` runs one point, or reads it if it was run before.
    It returns None if a signal came.
    """
    runs: list[Run] = []
    lrs, widened = list(lrs), 0
    with _study(database, name) as study:
        while True:
            grid = {"lr": lrs, **({"weight_decay": list(decays)} if decays else {})}
            if not _exhaust(study, grid, run_point):
                return None
            found = [
                run_point(dict(zip(grid, values))) for values in itertools.product(*grid.values())
            ]
            assert all(found), "every point of the grid was run"
            runs += [run for run in found if run is not None]
            losses: dict[float, float] = {}
            for run in runs:
                losses[run.result.lr] = min(run.loss, losses.get(run.result.lr, math.inf))
            further = wider(losses)
            if further is None or further > HIGHEST_RATE or widened == MAX_WIDENINGS:
                return runs
            lrs, widened = [further], widened + 1


def _exhaust(study: Any, grid: Grid, run_point: Callable[[GridPoint], Run | None]) -> bool:
    """Run what is left of the grid. Return False if a signal came."""
    import optuna

    # The values of a grid are given, not drawn.
    anything = optuna.distributions.FloatDistribution(0.0, sys.float_info.max)
    sampler = study.sampler = optuna.samplers.GridSampler(grid, seed=0)
    # It would stop optuna's loop, and this one is ours.
    sampler.after_trial = lambda *_: None  # type: ignore[method-assign]
    while (trial := _begun(study, grid)) is not None or not sampler.is_exhausted(study):
        if trial is None:
            study.ask(dict.fromkeys(grid, anything))
            continue
        point = {key: sampler.sample_independent(study, trial, key, anything) for key in grid}
        run = run_point(point)
        if run is None:
            return False
        study.tell(trial.number, run.loss)
    return True


def _begun(study: Any, grid: Grid) -> Any:
    """Return the trial that was begun but not finished, or None.

    It is of this process, or of one that was killed.
    """
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "search_space" not in trial.system_attrs:  # killed before its point was known
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.system_attrs["search_space"] == grid:
            return trial
    return None


@contextmanager
def _study(database: Path, name: str) -> Iterator[Any]:
    """Open optuna's study of this name, and close its database at the end.

    Raises UserError also if the database is damaged, locked, or on a disk that refuses.
    """
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise UserError(
            "comparing and tuning need optuna, which is not installed. "
            "Run: pip install 'finetune-rows[compare]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = database.absolute()
    unusable = f"{database} cannot be read or written"
    do = "If it is damaged, delete it: the runs that are over are kept"
    with ExitStack() as stack:
        with Border(unusable, do=do, reason=_first_reason):
            storage = optuna.storages.RDBStorage(  # a URL would read a ? or a { in the path
                "sqlite://", engine_kwargs={"creator": partial(sqlite3.connect, file)}
            )
            stack.callback(storage.engine.dispose)
            stack.callback(storage.remove_session)
            study = optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, direction="minimize"
            )
        try:
            yield study
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            raise UserError(f"{unusable}: {_first_reason(error)}. {do}") from error


def _first_reason(error: BaseException) -> str:
    """Return what SQLite said, of which the libraries above it write a page."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason_of(error)
