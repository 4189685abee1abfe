"""The numbers of a run as a reader wants them: the verdict, the comparison before and after, tables.

Floor 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.run.metrics import METRICS, MISSING, Metric, number
from finetune.run.records import RunRecords


@dataclass(frozen=True)
class Change:
    """A metric before and after training; `verdict` is "better", "worse", "same", or "" where there is nothing to compare."""

    metric: Metric
    before: str
    after: str
    difference: str
    verdict: str


def changes(run: RunRecords) -> list[Change]:
    """How each metric that was measured and has a tile has changed."""
    before, after = (part.metrics if part else {} for part in (run.before, run.after))
    return [
        _change(metric, before, after)
        for metric in METRICS
        if metric.has_tile and (metric.value(before), metric.value(after)) != (None, None)
    ]


def _change(metric: Metric, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    old, new = metric.value(before), metric.value(after)
    shown = metric.show(before), metric.show(after)
    if old is None or new is None or not math.isfinite(new - old):
        return Change(metric, *shown, "", "")
    if metric.key == "inactive_mass" and number(before, "active_tokens") != number(
        after, "active_tokens"
    ):
        return Change(metric, *shown, "", "")
    if shown[0] == shown[1]:
        return Change(metric, *shown, "no change", "same")
    difference = f"{new - old:+,.{metric.digits}f}".replace("-", "−")
    return Change(
        metric, *shown, difference, "better" if (new > old) == metric.higher_is_better else "worse"
    )


def verdict(run: RunRecords) -> str:
    """One sentence: what the run has done to the model."""
    told = [
        change
        for change in changes(run)
        if change.metric.key in ("loss", "chrf", "bleu", "unrelated_loss")
    ]
    if not told:
        return "No evaluation was recorded, so there is nothing to say about the model yet."
    if run.before is None or run.after is None:
        which = "Before training" if run.after is None else f"After step {run.after.step}"
        return (
            f"{which}: "
            + _listed(
                [f"{c.metric.name} {c.before if run.after is None else c.after}" for c in told]
            )
            + "."
        )
    return f"In {run.after.step:,} steps {_listed([_told(change) for change in told])}."


def _told(change: Change) -> str:
    name = {"loss": "the held-out loss", "unrelated_loss": "the loss on unrelated text"}.get(
        change.metric.key, change.metric.name
    )
    if change.verdict == "same":
        return f"{name} stayed at {change.after}"
    verb = "went from"
    if change.difference:
        verb = "rose from" if change.difference[0] == "+" else "fell from"
    return f"{name} {verb} {change.before} to {change.after}"


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def state(run: RunRecords) -> str:
    """Whether the run came to its end."""
    last = run.steps[-1].step if run.steps else 0
    if run.diverged:
        return f"stopped at step {last:,}: the loss was NaN or diverged"
    return (
        f"finished after {last:,} steps" if run.finished else f"not finished: {last:,} steps so far"
    )


def duration(run: RunRecords) -> str:
    """Time spent in steps and in evaluations."""
    training = sum(step.seconds for step in run.steps)
    evaluating = sum(evaluation.number("seconds") or 0.0 for evaluation in run.evaluations)
    if not training:
        return ""
    return f"{clock(training)} of training" + (
        f", {clock(evaluating)} of evaluation" if evaluating else ""
    )


def clock(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def counts(records: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The sections of data.json as one table: names of the columns, then (row name, values)."""
    sections = {name: values for name, values in records.items() if isinstance(values, dict)}
    keys = list(
        dict.fromkeys(
            key
            for values in sections.values()
            for key, value in values.items()
            if not isinstance(value, dict | list)
        )
    )
    rows = [
        (in_words(key), [plain(values.get(key)) for values in sections.values()]) for key in keys
    ]
    return [in_words(name) for name in sections], rows


def pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The scalars of a record as (name, value) for a list; a share is given in percent."""
    return [
        (in_words(key), f"{value:.1%}" if key.endswith("_share") else plain(value))
        for key, value in record.items()
        if not isinstance(value, dict | list)
    ]


def in_words(key: str) -> str:
    """A key of a file as a person writes it: memory_gib is "Memory (GiB)"."""
    name = key.removesuffix("_gib")
    return name.replace("_", " ").capitalize() + (" (GiB)" if name != key else "")


def plain(value: Any) -> str:
    """A scalar for a table: thousands set apart, shares with three digits, yes and no."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class SamplePair:
    """One held-out prompt with the model's answers before and after training (None: not recorded)."""

    prompt: str
    reference: str
    before: str | None
    after: str | None


def sample_pairs(run: RunRecords) -> tuple[list[SamplePair], int, int]:
    """The samples of the first and of the last step that has any, side by side, and these two steps (equal: there is only one)."""
    if not run.samples:
        return [], 0, 0
    steps = [sample.step for sample in run.samples]
    first, last = min(steps), max(steps)
    # The same prompt may occur twice, with different references: the reference is part of the key.
    by_step = {
        s: {(r.prompt, r.reference): r.output for r in run.samples if r.step == s}
        for s in (first, last)
    }
    keys = list(dict.fromkeys([*by_step[last], *by_step[first]]))
    has_before = first < last or last == 0
    has_after = last > 0
    return (
        [
            SamplePair(
                *key,
                by_step[first].get(key) if has_before else None,
                by_step[last].get(key) if has_after else None,
            )
            for key in keys
        ],
        first,
        last,
    )
