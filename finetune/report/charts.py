"""Which curves a run has, each with its text alternative.

Floor 1.
"""

import math
from dataclasses import dataclass

from finetune.report.curves import Curve, Points, draw, points_of, smooth
from finetune.run.records import RunRecords

_TEXT_METRICS = [("chrf", "chrF", "line"), ("bleu", "BLEU", "dashed")]
_TRAINING = [
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_second", "Speed", "tokens per second"),
]


@dataclass(frozen=True)
class Chart:
    """A drawing for the page: `svg` goes in as it is; a large one takes half of the width, the others a third."""

    title: str
    unit: str
    svg: str
    large: bool


def charts_of(run: RunRecords) -> list[Chart]:
    """Return the charts of a run: the loss, the metrics of generated text, then what the training itself was like."""
    text = [
        Curve(label, points_of(run.evaluations, key), look) for key, label, look in _TEXT_METRICS
    ]
    text = [curve for curve in text if curve.points]
    charts = _loss(run)
    if text:
        said = " ".join(_in_words(curve.label, curve.points) for curve in text)
        charts.append(
            Chart(
                "Generated text",
                "0 to 100, higher is better",
                draw("text", text, description=said, zero=True),
                True,
            )
        )
    large = not text  # so that the rows are full: 2 + 3 charts, or 2 + 2
    for key, title, unit in _TRAINING:
        if points := points_of(run.steps, key):
            curves = [Curve(title, points, "line")] if key == "lr" else _with_smoothing(points)
            svg = draw(key, curves, description=_in_words(title, points), large=large, zero=True)
            charts.append(Chart(title, unit, svg, large))
    return charts


def _loss(run: RunRecords) -> list[Chart]:
    training, held_out = points_of(run.steps, "loss"), points_of(run.evaluations, "loss")
    curves = _with_smoothing(training) if training else []
    if held_out:
        curves.append(Curve("held-out", held_out, "dashed"))
    if not curves:
        return []
    said = " ".join(
        _in_words(label, points)
        for label, points in (("Training loss", training), ("Held-out loss", held_out))
        if points
    )
    return [
        Chart(
            "Loss",
            "nats per target token, lower is better",
            draw("loss", curves, description=said),
            True,
        )
    ]


def _with_smoothing(points: Points) -> list[Curve]:
    smoothed, span = smooth(points)
    if span == 1:
        return [Curve("each step", points, "line")]
    return [Curve("each step", points, "raw"), Curve(f"mean of about {span}", smoothed, "line")]


def _in_words(label: str, points: Points) -> str:
    """Say what a reader of the curve sees: where it starts, where it ends, how far it goes."""
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if not known:
        return f"{label}: no finite value."
    (first, start), (last, end) = known[0], known[-1]
    values = [value for _, value in known]
    return f"{label}: {start:.4g} at step {first:g}, {end:.4g} at step {last:g}, lowest {min(values):.4g}, highest {max(values):.4g}."
