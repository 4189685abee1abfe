"""The numbers of a run as its page shows them: verdict, before and after, tables, samples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.run.metrics import METRICS, MISSING, Metric, number
from finetune.run.records import RunRecords
from finetune.run.wording import clock, listed


@dataclass(frozen=True)
class Change:
    """A metric before and after training.

    `verdict` is "better", "worse", "same", or "" if there is nothing to compare.
    """

    metric: Metric
    before: str
    after: str
    difference: str
    verdict: str


def metric_changes(run: RunRecords) -> list[Change]:
    """Return how each metric has changed that was measured and has a tile."""
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
    """Return one sentence on what the run has done to the model."""
    shown = [
        change
        for change in metric_changes(run)
        if change.metric.key in ("loss", "chrf", "bleu", "unrelated_loss")
    ]
    if not shown:
        return "No evaluation was recorded, so there is nothing to say about the model yet."
    if run.after is None:
        return f"Before training: {listed([f'{c.metric.name} {c.before}' for c in shown])}."
    if run.before is None:
        values = listed([f"{c.metric.name} {c.after}" for c in shown])
        return f"After step {run.after.step}: {values}."
    return f"In {run.after.step:,} steps {listed([_in_words(change) for change in shown])}."


def _in_words(change: Change) -> str:
    name = {"loss": "the held-out loss", "unrelated_loss": "the loss on unrelated text"}.get(
        change.metric.key, change.metric.name
    )
    if change.verdict == "same":
        return f"{name} stayed at {change.after}"
    verb = "went from"
    if change.difference:
        verb = "rose from" if change.difference[0] == "+" else "fell from"
    return f"{name} {verb} {change.before} to {change.after}"


def run_state(run: RunRecords) -> str:
    """Return whether the run reached its end, and after how many steps."""
    last = run.steps[-1].step if run.steps else 0
    if run.diverged:
        return f"stopped at step {last:,}: the loss was NaN or diverged"
    return (
        f"finished after {last:,} steps" if run.finished else f"not finished: {last:,} steps so far"
    )


def duration(run: RunRecords) -> str:
    """Return the time spent in steps and in evaluations, or "" if no step was timed."""
    training = sum(step.seconds for step in run.steps)
    evaluating = sum(evaluation.number("seconds") or 0.0 for evaluation in run.evaluations)
    if not training:
        return ""
    return f"{clock(training)} of training" + (
        f", {clock(evaluating)} of evaluation" if evaluating else ""
    )


def token_counts(run: RunRecords) -> list[tuple[str, str]]:
    """Return the tokens of all steps, and how many were computed if beginnings were shared."""
    read, computed = (
        sum(getattr(step, name) for step in run.steps)
        for name in ("num_tokens", "num_computed_tokens")
    )
    if not 0 < computed < read:
        return []
    times = f"{computed:,} ({read / computed:.1f} times fewer)"
    return [("Tokens of all steps", f"{read:,}"), ("Computed, shared beginnings once", times)]


def counts(data: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the sections of data.json as one table.

    First come the columns' names, then (name, values) of each line.
    """
    sections = {name: values for name, values in data.items() if isinstance(values, dict)}
    keys = dict.fromkeys(
        key
        for values in sections.values()
        for key, value in values.items()
        if not isinstance(value, dict | list)
    )
    lines = [
        (label_of(key), [_plain(values.get(key)) for values in sections.values()]) for key in keys
    ]
    return [label_of(name) for name in sections], lines


def pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the scalars of a record as (label, value). A share is given in percent."""
    return [
        (label_of(key), f"{value:.1%}" if key.endswith("_share") else _plain(value))
        for key, value in record.items()
        if not isinstance(value, dict | list)
    ]


def label_of(key: str) -> str:
    """Return a file's key as a person writes it: memory_gib is "Memory (GiB)"."""
    name = key.removesuffix("_gib")
    return name.replace("_", " ").capitalize() + (" (GiB)" if name != key else "")


def _plain(value: Any) -> str:
    """Return a scalar for a table: 12,000 with a comma, fractions in four figures, yes or no."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def parameter_count(number: int) -> str:
    """Return a number of parameters as text, in millions from one million on."""
    return f"{number / 1e6:,.1f} M parameters" if number >= 1e6 else f"{number:,} parameters"


@dataclass(frozen=True)
class SamplePair:
    """One held-out prompt with the answers before and after training; None if not recorded."""

    prompt: str
    reference: str
    before: str | None
    after: str | None


def sample_pairs(run: RunRecords) -> tuple[list[SamplePair], int, int]:
    """Return the samples of the first and of the last step that has any, and these two steps.

    The two steps are equal if only one step has samples.
    """
    if not run.samples:
        return [], 0, 0
    steps = [sample.step for sample in run.samples]
    first, last = min(steps), max(steps)
    # The same prompt may occur twice, with different references: the reference is part of the key.
    by_step = {
        step: {(s.prompt, s.reference): s.output for s in run.samples if s.step == step}
        for step in (first, last)
    }
    before = by_step[first] if first < last or last == 0 else {}
    after = by_step[last] if last > 0 else {}
    keys = dict.fromkeys([*by_step[last], *by_step[first]])
    return [SamplePair(*key, before.get(key), after.get(key)) for key in keys], first, last
