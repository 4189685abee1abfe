"""Curves against steps as inline SVG, in colours that the page decides.

Floor 1. matplotlib draws with stand-in colours that become CSS variables, so that one drawing serves light, dark and paper. Text
stays text, in the page's font. Curves differ in stroke and markers as well as in colour (Okabe and Ito's,
https://jfly.uni-koeln.de/color/).
"""

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from finetune.run.records import Evaluation, StepRecord

INK, GRID, FIRST, SECOND = "#0a0b0c", "#0a0b0d", "#0a0b0e", "#0a0b0f"
VARIABLES = {
    INK: "var(--muted)",
    GRID: "var(--line)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "finetune",  # the same numbers give the same file
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}

MAX_MARKERS = 25  # points a curve, beyond which markers only blur it

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Points (step, value) and how to draw them: "raw", "line", "dashed"."""

    label: str
    points: Points
    look: str


def points_of(records: Sequence[StepRecord | Evaluation], key: str) -> Points:
    """Return (step, value) wherever `key` is a number. NaN and infinity leave a gap."""
    points = []
    for record in records:
        if (value := record.number(key)) is not None:
            points.append((float(record.step), value if math.isfinite(value) else math.nan))
    return points


def smooth(points: Points) -> tuple[Points, int]:
    """Return an exponential moving average without the bias of its start, and over about how many steps (a tenth of all)."""
    span = max(1, len(points) // 10)
    decay = 1 - 1 / span
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        smoothed.append((step, total / weight if weight and math.isfinite(value) else math.nan))
    return smoothed, span


def draw(
    name: str, curves: Sequence[Curve], *, description: str, large: bool = True, zero: bool = False
) -> str:
    """Return the SVG of `curves`; `description` is its text alternative, `name` makes its ids unique in a page.

    `zero`: the value axis begins at 0.
    """
    width, height = (440, 280) if large else (330, 220)  # CSS pixels
    with mpl.rc_context(STYLE | {"font.size": 12 if large else 11}):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            _plot(axes, curve)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.set_xlabel("step")
        axes.margins(x=0.03, y=0.08)
        if zero:
            axes.set_ylim(bottom=0)
        if len(curves) > 1:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.02, 1.0),
                ncols=len(curves),
                borderaxespad=0.2,
                columnspacing=1.4,
            )
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return inline(file.getvalue(), name, description)


def _plot(axes: Axes, curve: Curve) -> None:
    steps, values = [step for step, _ in curve.points], [value for _, value in curve.points]
    looks: dict[str, dict[str, Any]] = {
        "raw": {"color": FIRST, "alpha": 0.45, "linewidth": 1},
        "line": {"color": FIRST, "linewidth": 1.8, "marker": "o"},
        "dashed": {"color": SECOND, "linewidth": 1.8, "marker": "s", "linestyle": (0, (4, 2))},
    }
    marker_size = 4.5 if len(steps) <= MAX_MARKERS else 0
    axes.plot(steps, values, label=curve.label, markersize=marker_size, **looks[curve.look])


def tick(value: float) -> str:
    """A number on an axis: 12,000, 2.5, 5e-5."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.001:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def inline(svg: str, name: str, description: str, more: dict[str, str] | None = None) -> str:
    """Turn a matplotlib SVG file into an element of a page: no prologue, own ids, the page's colours and font.

    `more`: stand-in colours beside those here, with the CSS variables that they become.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    svg = re.sub(
        r"<svg[^>]*>",
        f'<svg {view_box[0]} role="img" aria-label="{html.escape(description)}">',
        svg,
        count=1,
    )
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for stand_in, variable in (VARIABLES | (more or {})).items():
        svg = svg.replace(stand_in, variable)
    return svg
