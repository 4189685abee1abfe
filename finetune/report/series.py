"""How several series are told apart: by colour, by line and by marker, so that any one of them is enough.

Floor 1. The colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), darkened or lightened until each has a contrast of 3
with its ground; comparison.css has them for light and dark.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from finetune.report.svg import STYLE, inline

NUM_COLOURS = 8
STAND_INS = {
    f"#0b0c{10 + number:02x}": f"var(--series-{number + 1})" for number in range(NUM_COLOURS)
}

LINES: list[Any] = ["solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (9, 2.5))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


@dataclass(frozen=True)
class Look:
    """What matplotlib needs to know of one series."""

    colour: str
    line: Any
    marker: str


@dataclass(frozen=True)
class Picture:
    """A drawing for the page: `svg` goes in as it is; `size` is how much of the width it takes, "wide", "half" or "third"."""

    title: str
    unit: str
    svg: str
    size: str


def look(number: int) -> Look:
    """The look of the series with this number; no two of the first 35 share line and marker."""
    return Look(
        list(STAND_INS)[number % NUM_COLOURS],
        LINES[number % len(LINES)],
        MARKERS[number % len(MARKERS)],
    )


def line(number: int) -> dict[str, Any]:
    """The look as matplotlib's arguments for a line."""
    style = look(number)
    return {
        "color": style.colour,
        "linestyle": style.line,
        "marker": style.marker,
        "markersize": 5,
        "linewidth": 1.8,
    }


def picture(
    name: str, size: tuple[int, int], description: str, fill: Callable[[Figure], None]
) -> str:
    """The SVG of what `fill` draws into a figure of `size` CSS pixels; `description` is its text alternative."""
    with mpl.rc_context(STYLE | {"font.size": 11}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        fill(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return inline(file.getvalue(), name, description, STAND_INS)
