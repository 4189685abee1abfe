"""Drawings for the pages: inline SVG in colours that the page decides.

matplotlib draws with stand-in colours, which become CSS variables here. So one drawing serves
light, dark and paper. Text stays text, in the page's font. Series differ in colour, in line and in
marker, so that any one of the three is enough. The colours are Okabe and Ito's
(https://jfly.uni-koeln.de/color/). Those of the series are darkened or lightened until each has a
contrast of 3 with its ground; comparison.css has them for light and dark.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from finetune.run.records import Evaluation, StepRecord

INK, _GRID, _FIRST, _SECOND = "#0a0b0c", "#0a0b0d", "#0a0b0e", "#0a0b0f"
NUM_COLOURS = 8
SERIES_COLOURS = {
    f"#0b0c{10 + number:02x}": f"var(--series-{number + 1})" for number in range(NUM_COLOURS)
}
_VARIABLES = {
    INK: "var(--muted)",
    _GRID: "var(--line)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    **SERIES_COLOURS,
}
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.2, 1.6), (6, 2, 1.2, 2), (9, 2.5))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "finetune",  # the same numbers give the same file
    "text.color": INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
_MAX_MARKERS = 25  # on one curve; more of them only blur it

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """A drawing with its caption. The page inserts `svg` unchanged."""

    title: str
    unit: str
    svg: str
    size: str  # how much of the page's width it takes: "wide", "half" or "third"


@dataclass(frozen=True)
class Curve:
    """Points (step, value) and how they are drawn: "raw", "line" or "dashed"."""

    label: str
    points: Points
    look: str


@dataclass(frozen=True)
class Look:
    """The three things that distinguish one series from another."""

    colour: str
    dashes: tuple[float, ...]  # lengths drawn and left out; () is a solid line
    marker: str  # matplotlib's letter

    @property
    def line(self) -> Any:
        """The dashes as matplotlib takes them."""
        return (0, self.dashes) if self.dashes else "solid"


def look(number: int) -> Look:
    """Return the look of series `number`. No two of the first 35 share both line and marker."""
    return Look(
        list(SERIES_COLOURS)[number % NUM_COLOURS],
        DASHES[number % len(DASHES)],
        MARKERS[number % len(MARKERS)],
    )


def line_style(number: int) -> dict[str, Any]:
    """Return the look of series `number` as the arguments that matplotlib takes for a line."""
    style = look(number)
    return {
        "color": style.colour,
        "linestyle": style.line,
        "marker": style.marker,
        "markersize": 5,
        "linewidth": 1.8,
    }


def points_of(records: Sequence[StepRecord | Evaluation], key: str) -> Points:
    """Return (step, value) for each record in which `key` is a number.

    NaN and infinity become NaN, which leaves a gap.
    """
    points = []
    for record in records:
        if (value := record.number(key)) is not None:
            points.append((float(record.step), value if math.isfinite(value) else math.nan))
    return points


def smooth(points: Points) -> tuple[Points, int]:
    """Return the mean around each point, and over how many points it is: about a tenth of all.

    The mean is centred, so it does not lag: near an end it takes fewer points, as many on either
    side. A curve that is smooth already is returned as it is, with a span of 1.
    """
    reach = len(points) // 20
    values = np.array([value for _, value in points], dtype=float)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(points))
    reaches = np.minimum(reach, np.minimum(places, len(points) - 1 - places))
    first, end = places - reaches, places + reaches + 1
    with np.errstate(invalid="ignore"):
        means = (sums[end] - sums[first]) / (counts[end] - counts[first])
    means[~known] = math.nan
    if reach == 0 or not known.any() or _is_smooth(values[known], means[known]):
        return points, 1
    return [(step, float(mean)) for (step, _), mean in zip(points, means)], 2 * reach + 1


def _is_smooth(values: Any, means: Any) -> bool:
    """Return whether the points lie, on average, within 1 % of the curve's height of the mean."""
    return float(np.abs(values - means).mean()) <= 0.01 * float(np.ptp(values))


def draw_curves(
    name: str,
    curves: Sequence[Curve],
    *,
    description: str,
    last_step: float,
    best_step: int | None = None,
    zero: bool = False,
) -> str:
    """Return the SVG of `curves` against steps, from 0 to `last_step`.

    With `zero` the value axis begins at 0. The step of the best evaluation is marked by a line.
    `name` and `description` are those of `draw_svg`.
    """

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for curve in curves:
            _plot(axes, curve)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.set_xlabel("step")
        axes.margins(y=0.08)
        axes.set_xlim(-0.03 * last_step, 1.03 * last_step)
        if best_step is not None:
            axes.axvline(best_step, color=INK, linewidth=1, linestyle=(0, (1, 2)))
            axes.annotate(
                "best",
                (best_step, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(-3, -3),
                textcoords="offset points",
                ha="right",
                va="top",
            )
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

    return draw_svg(name, (440, 280), description, fill, font_size=12)


def _plot(axes: Axes, curve: Curve) -> None:
    steps, values = [step for step, _ in curve.points], [value for _, value in curve.points]
    looks: dict[str, dict[str, Any]] = {
        "raw": {"color": _FIRST, "alpha": 0.45, "linewidth": 1},
        "line": {"color": _FIRST, "linewidth": 1.8, "marker": "o"},
        "dashed": {"color": _SECOND, "linewidth": 1.8, "marker": "s", "linestyle": (0, (4, 2))},
    }
    marker_size = 4.5 if len(steps) <= _MAX_MARKERS else 0
    axes.plot(steps, values, label=curve.label, markersize=marker_size, **looks[curve.look])


def tick(value: float) -> str:
    """Return a number as it is written on an axis: 12,000, 2.5, 5e-5."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def draw_svg(
    name: str,
    size: tuple[int, int],
    description: str,
    fill: Callable[[Figure], None],
    *,
    font_size: int = 11,
) -> str:
    """Return the SVG element of what `fill` draws into a figure of `size`, in CSS pixels.

    `description` is its text alternative. `name` makes its ids unique within a page.
    """
    with mpl.rc_context(_STYLE | {"font.size": font_size}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        fill(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _inline(file.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> str:
    """Return a matplotlib SVG file as an element of a page.

    The prologue is removed; ids, colours and fonts become the page's own.
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
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg
