"""The curves of a run, each with its text alternative."""

import math

from finetune.report.svg import Curve, Picture, Points, draw_curves, points_of, smooth
from finetune.run.records import RunRecords

_TEXT_METRICS = [("chrf", "chrF", "line"), ("bleu", "BLEU", "dashed")]
_TRAINING = [
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_second", "Speed", "tokens per second"),
]


def charts_of(run: RunRecords) -> list[Picture]:
    """Return the charts of a run: the loss, the metrics of generated text, then training itself."""
    text = [
        Curve(label, points_of(run.evaluations, key), look) for key, label, look in _TEXT_METRICS
    ]
    text = [curve for curve in text if curve.points]
    steps = [record.step for record in run.steps] + [record.step for record in run.evaluations]
    last = max(steps, default=0) or 1
    charts = _loss(run, last)
    if text:
        description = " ".join(_in_words(curve.label, curve.points) for curve in text)
        svg = draw_curves("text", text, description=description, last_step=last, zero=True)
        charts.append(Picture("Generated text", "0 to 100, higher is better", svg, "half"))
    for key, title, unit in _TRAINING:
        if points := points_of(run.steps, key):
            curves = [Curve(title, points, "line")] if key == "lr" else _with_smoothing(points)
            description = _in_words(title, points)
            svg = draw_curves(key, curves, description=description, last_step=last, zero=True)
            charts.append(Picture(title, unit, svg, "half"))
    return charts


def _loss(run: RunRecords, last_step: int) -> list[Picture]:
    training, held_out = points_of(run.steps, "loss"), points_of(run.evaluations, "loss")
    curves = _with_smoothing(training) if training else []
    if held_out:
        curves.append(Curve("held-out", held_out, "dashed"))
    if not curves:
        return []
    description = " ".join(
        _in_words(label, points)
        for label, points in (("Training loss", training), ("Held-out loss", held_out))
        if points
    )
    best = run.best.step if run.best is not None and len(held_out) > 2 else None
    svg = draw_curves("loss", curves, description=description, last_step=last_step, best_step=best)
    unit = "nats per target token, lower is better; the axis need not begin at 0"
    return [Picture("Loss", unit, svg, "half")]


def _with_smoothing(points: Points) -> list[Curve]:
    smoothed, span = smooth(points)
    if span == 1:
        return [Curve("each step", points, "line")]
    return [Curve("each step", points, "raw"), Curve(f"mean of {span} around it", smoothed, "line")]


def _in_words(label: str, points: Points) -> str:
    """Return what a reader of the curve sees: its start, end, lowest and highest value."""
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if not known:
        return f"{label}: no finite value."
    (first, start), (last, end) = known[0], known[-1]
    values = [value for _, value in known]
    return (
        f"{label}: {start:.4g} at step {first:g}, {end:.4g} at step {last:g}, "
        f"lowest {min(values):.4g}, highest {max(values):.4g}."
    )
