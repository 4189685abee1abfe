"""The numbers of a run as its page shows them: verdict, before and after, tables, samples."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune.run.metrics import METRICS, MISSING, Metric, number
from finetune.run.records import Evaluation, RunRecords
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
        if not metric.about_vocabulary
        and (metric.value(before), metric.value(after)) != (None, None)
    ]


_OF_INACTIVE_TARGETS = ("loss_inside", "share_outside")  # they say nothing if there are none


def vocabulary_lines(run: RunRecords) -> list[tuple[Metric, str, str]]:
    """Return (metric, before, after) of each figure about the vocabulary that says something."""
    before, after = (part.metrics if part else {} for part in (run.before, run.after))
    has_inactive = any(number(part, "share_outside") for part in (before, after))
    return [
        (metric, metric.show(before), metric.show(after))
        for metric in METRICS
        if metric.about_vocabulary
        and (has_inactive or metric.key not in _OF_INACTIVE_TARGETS)
        and (metric.value(before), metric.value(after)) != (None, None)
    ]


def evaluation_columns(run: RunRecords) -> list[Metric]:
    """Return the metrics that the table of evaluations shows: those without a part of their own."""
    evaluated = [*(evaluation.metrics for evaluation in run.evaluations), run.test]
    return [
        metric
        for metric in METRICS
        if not metric.about_vocabulary
        and any(metric.value(figures) is not None for figures in evaluated)
    ]


FOLDED_FROM = 12  # rows of evaluations; with more, only the first, the best and the last are open


def evaluation_parts(run: RunRecords) -> list[tuple[bool, list[Evaluation]]]:
    """Return the evaluations in order, cut into runs that are folded (True) or open."""
    if len(run.evaluations) <= FOLDED_FROM:
        return [(False, run.evaluations)]
    best = run.best.step if run.best is not None else None
    parts: list[tuple[bool, list[Evaluation]]] = []
    for place, evaluation in enumerate(run.evaluations):
        is_open = place in (0, len(run.evaluations) - 1) or evaluation.step == best
        if not parts or parts[-1][0] is is_open:
            parts.append((not is_open, []))
        parts[-1][1].append(evaluation)
    return parts


def _change(metric: Metric, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    old, new = metric.value(before), metric.value(after)
    shown = metric.show(before), metric.show(after)
    if old is None or new is None or not math.isfinite(new - old):
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
    done, steps = run.after.step, run.steps[-1].step if run.steps else 0
    is_last = not run.finished or done >= steps
    how = f"In {done:,} steps" if is_last else f"By step {done:,} of {steps:,}, the best,"
    return f"{how} {listed([_in_words(change) for change in shown])}."


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


def run_state(run: RunRecords, *, live: bool = False) -> str:
    """Return whether the run reached its end, and after how many steps."""
    last = run.steps[-1].step if run.steps else 0
    if live:
        return f"training: {last:,} steps so far"
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


def phases(run: RunRecords) -> list[tuple[str, str]]:
    """Return the time of each phase that was measured, and the peak memory, for a table."""
    training = sum(step.seconds for step in run.steps)
    evaluating = sum(evaluation.number("seconds") or 0.0 for evaluation in run.evaluations)
    total = training + evaluating
    found = [
        (name, f"{clock(seconds)} ({seconds / total:.0%})")
        for name, seconds in (("Training steps", training), ("Evaluations", evaluating))
        if seconds
    ]
    peak = run.environment.peak_memory_gib
    return [*found, *([("Peak memory of the process", f"{peak:,.1f} GiB")] if peak else [])]


def settings(run: RunRecords) -> list[tuple[str, str]]:
    """Return the settings that differ from their defaults."""
    return [(key, _as_yaml(value)) for key, value in run.environment.settings.items()]


def _as_yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


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
        (label_of(key), [_plain(values.get(key)) for values in sections.values()])
        for key in keys
        if any(values.get(key) for values in sections.values())  # a count of 0 says nothing
    ]
    return [label_of(name) for name in sections], lines


def pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the scalars of a record as (label, value). A share is given in percent."""
    return [
        (label_of(key), f"{value:.1%}" if key.endswith("_share") else _plain(value))
        for key, value in record.items()
        if not isinstance(value, dict | list)
    ]


_LABELS = {
    "lora": "LoRA",
    "step": "A step has",
    "tied": "Input and output share their table",
    "token_table_share": "Token tables' share of the parameters",
    "memory_gib": "Memory of the machine (GiB)",
    "vocab_size": "Rows of the token table",
}


def date_of(started: str) -> str:
    """Return an ISO 8601 time as a person writes it: 28 Nov 2026, 17:51 UTC."""
    try:
        time = datetime.fromisoformat(started).astimezone(UTC)
    except ValueError:
        return started
    return f"{time.day} {_MONTHS[time.month - 1]} {time.year}, {time:%H:%M} UTC"


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def label_of(key: str) -> str:
    """Return a file's key as a person writes it: memory_gib is "Memory of the machine (GiB)"."""
    if key in _LABELS:
        return _LABELS[key]
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
    before_cut: bool  # the answer has all the tokens that it might have
    after_cut: bool


def sample_pairs(run: RunRecords) -> tuple[list[SamplePair], int, int]:
    """Return the samples of the first step that has any and of the last, and these two steps.

    The last one is that of the weights in model/, if it has some. The two steps are equal if only
    one step has samples.
    """
    if not run.samples:
        return [], 0, 0
    steps = {sample.step for sample in run.samples}
    first, last = min(steps), max(steps)
    if run.finished and run.after is not None and run.after.step in steps:
        last = run.after.step
    # The same prompt may occur twice, with different references: the reference is part of the key.
    by_step = {
        step: {(s.prompt, s.reference): s for s in run.samples if s.step == step}
        for step in (first, last)
    }
    before = by_step[first] if first < last or last == 0 else {}
    after = by_step[last] if last > 0 else {}
    keys = dict.fromkeys([*by_step[last], *by_step[first]])
    pairs = []
    for key in keys:
        both = before.get(key), after.get(key)
        old, new = (sample.output if sample is not None else None for sample in both)
        cut = [sample is not None and sample.cut for sample in both]
        pairs.append(SamplePair(*key, old, new, before_cut=cut[0], after_cut=cut[1]))
    return pairs, first, last
