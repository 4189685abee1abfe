"""The search for a learning rate, and a weight decay, over a grid: optuna keeps the book, the runs keep their own results.

Floor 5. Grid points are optuna's `GridSampler`'s (https://optuna.readthedocs.io), its study lies in SQLite: a search that was
stopped goes on where it stopped, and `optuna-dashboard` can read it.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.comparison.grids import MAX_WIDENINGS, wider
from finetune.comparison.runs import Run
from finetune.errors import UserError

Space = dict[str, list[float]]


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
