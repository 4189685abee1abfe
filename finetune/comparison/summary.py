"""From the runs of a comparison to what is reported: the plain values of comparison.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from finetune.comparison.frequency import BINS
from finetune.comparison.statistics import Interval, interval, paired
from finetune.comparison.verdict import judge
from finetune.run.trials import Point, Run

TARGET_SHARE = 0.9
"""Where the target is that steps are counted to.

It is this share of the way from the held-out loss before training to the lowest mean one after it.
"""


def summarise(
    tuning: Mapping[str, Sequence[Run]], reported: Mapping[str, Sequence[Run]], *, grid_size: int
) -> dict[str, Any]:
    """Return the whole comparison, with the optimizers in the order of `reported`.

    The runs of one optimizer are in the order of their seeds. `tuning` has the runs that chose each
    learning rate. The first `grid_size` of them were planned; the others widened the grid.
    """
    target = target_loss(reported)
    tests = {name: _interval(runs) for name, runs in reported.items()}
    verdict = judge(
        tests, {name: sum(run.diverged for run in runs) for name, runs in reported.items()}
    )
    best = verdict.ranking[0] if verdict.ranking else None
    entries = {
        name: _entry(
            tuning[name],
            runs,
            grid_size=grid_size,
            target=target,
            baseline=reported[best] if best else None,
        )
        for name, runs in reported.items()
    }
    return {
        "verdict": {
            "winner": verdict.winner,
            "ranking": verdict.ranking,
            "tied": verdict.tied,
            "sentences": verdict.sentences,
        },
        "target": {"loss": target, "share": TARGET_SHARE},
        "optimizers": entries,
        "bins": next(
            (run.result.bins for runs in reported.values() for run in runs if run.result.bins), None
        ),
        "starts": {
            str(run.result.seed): run.result.start for runs in reported.values() for run in runs
        },
        "runs": [
            _run(run, target, widening=phase == "tuning" and number >= grid_size)
            for phase, part in (("tuning", tuning), ("reported", reported))
            for runs in part.values()
            for number, run in enumerate(runs)
        ],
    }


def target_loss(reported: Mapping[str, Sequence[Run]]) -> float | None:
    """Return the held-out loss to count steps to.

    It is None if no optimizer got below the loss before training.
    """
    starts = [
        run.points[0].loss
        for runs in reported.values()
        for run in runs
        if run.points and run.points[0].step == 0
    ]
    ends = [fmean(run.loss for run in runs) for runs in reported.values()]
    if not starts or not (lowest := min(ends)) < (start := fmean(starts)):
        return None
    return start - TARGET_SHARE * (start - lowest)


def _entry(
    tuning: Sequence[Run],
    runs: Sequence[Run],
    *,
    grid_size: int,
    target: float | None,
    baseline: Sequence[Run] | None,
) -> dict[str, Any]:
    """Return what is reported of one optimizer. `baseline` has the runs of the best one."""
    chosen = runs[0].result.lr
    lrs = sorted({run.result.lr for run in tuning})
    reached = [run.first_at(target) if target is not None else None for run in runs]
    comparable = baseline not in (None, runs) and not any(run.diverged for run in runs)
    return {
        "settings": runs[0].result.settings,
        "lr": chosen,
        "tuning_trials": len(tuning),
        "widenings": max(0, len(tuning) - grid_size),
        "at_edge": len(lrs) >= 3 and chosen in (lrs[0], lrs[-1]),
        "tuning_diverged": sum(run.diverged for run in tuning),
        "reported_runs": len(runs),
        "reported_diverged": sum(run.diverged for run in runs),
        "validation": _shown(_interval(runs, lambda run: run.loss)),
        "test": _shown(_interval(runs)),
        "test_by_frequency": _by_frequency(runs),
        "difference_to_best": _shown(
            paired([run.test_loss for run in runs], [run.test_loss for run in baseline])
            if comparable and baseline
            else None
        ),
        "to_target": {
            "reached": sum(point is not None for point in reached),
            "steps": _median_to(reached, "step"),
            "tokens": _median_to(reached, "tokens"),
            "seconds": _median_to(reached, "seconds"),
        },
        "tokens": max(run.points[-1].tokens for run in runs) if runs else 0,
        "seconds": fmean(run.points[-1].seconds for run in runs),
        "seconds_per_step": fmean(
            run.points[-1].seconds / max(1, run.points[-1].step) for run in runs
        ),
        "state_bytes": max(run.result.state_bytes for run in runs),
        "curve": _curve(runs),
        "updates": _mean_curve([run.updates for run in runs]),
    }


def _interval(runs: Sequence[Run], value: Any = lambda run: run.test_loss) -> Interval | None:
    """Return the mean with its interval; None if a run diverged.

    A mean over the other runs would leave out what went wrong.
    """
    return None if any(run.diverged for run in runs) else interval([value(run) for run in runs])


def _by_frequency(runs: Sequence[Run]) -> dict[str, Any] | None:
    if any(run.diverged or run.result.test is None for run in runs):
        return None
    found = [run.result.test for run in runs if run.result.test is not None]
    return {
        name: _shown(interval([test[name] for test in found]))
        for name in BINS
        if all(name in test for test in found)
    }


def _median_to(reached: Sequence[Point | None], what: str) -> float | None:
    """Return the median over seeds, in which a miss is infinite; None if the median is a miss."""
    value = median(
        [math.inf if point is None else float(getattr(point, what)) for point in reached]
    )
    return value if math.isfinite(value) else None


def _curve(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the held-out loss as far as every seed has one.

    Each point has the mean, the lowest and the highest loss, and the mean cost until then.
    """
    curve = []
    for points in zip(*(run.points for run in runs)):
        losses = [point.loss for point in points]
        if not all(map(math.isfinite, losses)):
            break
        curve.append(
            {
                "step": points[0].step,
                "loss": fmean(losses),
                "lowest": min(losses),
                "highest": max(losses),
                "tokens": fmean(point.tokens for point in points),
                "seconds": fmean(point.seconds for point in points),
            }
        )
    return curve


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    return [(points[0][0], fmean(value for _, value in points)) for points in zip(*curves)]


def _run(run: Run, target: float | None, *, widening: bool) -> dict[str, Any]:
    """Return one line of comparison.csv."""
    result, last = run.result, run.points[-1] if run.points else Point(0, math.inf, 0, 0.0)
    reached = run.first_at(target) if target is not None else None
    test = result.test or {}
    return {
        "optimizer": result.optimizer,
        "phase": result.phase,
        "seed": result.seed,
        "lr": result.lr,
        "weight_decay": result.settings.get("weight_decay"),
        "widening": widening,
        "diverged": run.diverged,
        "steps": run.steps,
        "validation_loss": None if run.diverged else run.loss,
        "test_loss": test.get("all"),
        **{f"test_loss_{name}": test.get(name) for name in BINS},
        "steps_to_target": reached.step if reached else None,
        "tokens": last.tokens,
        "seconds": round(last.seconds, 3),
        "state_bytes": result.state_bytes,
        "load": result.load,
        "problem": result.problem,
    }


def _shown(value: Interval | None) -> dict[str, float | None] | None:
    return None if value is None else asdict(value)
