"""The descents as pictures: for each landscape a still SVG and an animated one, and a page of all.

Each is one self-contained file without scripts, as wide as what shows it, and dark where that is.
matplotlib draws the still. In the animation SVG's own animation elements (SMIL,
https://www.w3.org/TR/SVG11/animate.html) replace its lines, so that it also moves as an image in a
page. A viewer that cannot animate shows the end. The descents differ in colour (Okabe and Ito's,
https://jfly.uni-koeln.de/color/), dashes and marker.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from finetune.errors import UserError, did_you_mean
from finetune.landscape.animation import LOOKS, animate
from finetune.landscape.descents import (
    LEARNING_RATES,
    Descent,
    check_descent,
    descend_by_default,
    descend_tuned,
)
from finetune.landscape.functions import LANDSCAPES, Landscape
from finetune.report.svg import Look
from finetune.run.claim import claim_folder
from finetune.run.files import write_text

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "finetune",  # the same descents give the same file
    "font.size": 10,
    "axes.edgecolor": "#9a9fa6",
    "axes.linewidth": 0.8,
    "xtick.color": "#5b6068",
    "ytick.color": "#5b6068",
}
LEVELS = 11  # contour lines
GROUND_DPI = 110  # of the contours; everything else is vectors
DARK = """<style>@media (prefers-color-scheme: dark) {
  svg { filter: invert(0.92) hue-rotate(180deg); } }</style>"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Landscapes</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem; font: 1rem/1.5 system-ui, sans-serif; }
img { width: 100%; }
</style></head><body>
<h1>Optimizers on classic functions</h1>
"""


def draw_landscapes(
    output: Path,
    *,
    functions: Sequence[str],
    optimizers: Sequence[str],
    steps: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write NAME.svg and NAME-animated.svg for each of `functions`, and index.html, into `output`.

    Return their paths.

    Every optimizer takes `steps` steps from the same start: once at its default learning rate, and
    once at the best of a grid that is the same for all. `say` is called with each descent in words.

    Raises UserError for an unknown function, for an optimizer that is unknown or needs a model, for
    more optimizers than a picture can distinguish, and for a file there that finetune did not draw.
    """
    _check(functions, optimizers, steps)
    pictures = [(output / f"{name}.svg", output / f"{name}-animated.svg") for name in functions]
    index = output / "index.html"
    claim_folder(output, "landscape", [*(path for both in pictures for path in both), index])
    page = PAGE
    grid = f"{_number(LEARNING_RATES[0])} to {_number(LEARNING_RATES[-1])}"
    for landscape, paths in zip((LANDSCAPES[name] for name in functions), pictures):
        panels = {
            "at the default learning rates": [
                descend_by_default(landscape, name, steps) for name in optimizers
            ],
            f"at the best of the same {len(LEARNING_RATES)} learning rates, {grid}": [
                descend_tuned(landscape, name, steps) for name in optimizers
            ],
        }
        say(landscape.title)
        for title, descents in panels.items():
            say(f"  {title}")
            for descent in descents:
                say(f"    {descent_in_words(descent)}")
        for path, svg in zip(paths, _draw(landscape, panels, steps)):
            write_text(path, svg)
        page += _section(landscape, panels)
    write_text(index, f"{page}</body></html>\n")
    return [*(path for both in pictures for path in both), index]


def _section(landscape: Landscape, panels: dict[str, list[Descent]]) -> str:
    """Return a landscape's part of the page: the moving picture, and each descent in words."""
    name = landscape.name
    words = "".join(
        f"<h3>{title[0].upper()}{title[1:]}</h3>\n<ul>\n"
        + "".join(f"<li>{descent_in_words(descent)}</li>\n" for descent in descents)
        + "</ul>\n"
        for title, descents in panels.items()
    )
    return (
        f'<h2 id="{name}">{landscape.title}</h2>\n'
        f'<a href="{name}.svg"><img src="{name}-animated.svg" loading="lazy" '
        f'alt="The paths of {len(next(iter(panels.values())))} optimizers, described below"></a>\n'
        f"<details><summary>In words</summary>\n{words}</details>\n"
    )


def _check(functions: Sequence[str], optimizers: Sequence[str], steps: int) -> None:
    for function in functions:
        if function not in LANDSCAPES:
            raise UserError(
                f"there is no landscape {function!r}; the landscapes are {', '.join(LANDSCAPES)}"
                f"{did_you_mean(function, LANDSCAPES)}"
            )
    for name in optimizers:
        check_descent(name)
    if not 1 <= len(optimizers) <= len(LOOKS) or len(set(optimizers)) < len(optimizers):
        given = ", ".join(optimizers) or "none"
        raise UserError(
            f"optimizers {given}: a picture shows 1 to {len(LOOKS)} different ones. "
            "Name others, or draw two pictures"
        )
    if not functions:
        raise UserError(f"no landscape was named. The landscapes are {', '.join(LANDSCAPES)}")
    if steps < 1:
        raise UserError(f"--steps is {steps}; it must be at least 1")


def descent_in_words(descent: Descent) -> str:
    """Return the optimizer, its learning rate, and how the descent ended."""
    edge = " (an end of the grid)" if descent.lr in (LEARNING_RATES[0], LEARNING_RATES[-1]) else ""
    if descent.diverged:
        end = f"diverges at step {len(descent.points)}"
    elif descent.settled is not None:
        end = f"arrives at step {descent.settled}"
    else:
        end = f"ends {descent.height:.2g} above the minimum"
    return f"{descent.optimizer}, lr {_number(descent.lr)}{edge}: {end}"


def _number(lr: float) -> str:
    return f"{lr:g}".replace("e-0", "e-")


def _draw(landscape: Landscape, panels: dict[str, list[Descent]], steps: int) -> tuple[str, str]:
    """Return the still and the animated SVG of one landscape, with a panel for each of `panels`."""
    most = max(len(descents) for descents in panels.values())
    with mpl.rc_context(_STYLE):
        spaced = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)  # inches
        figure = Figure(figsize=(11, 5.6 + 0.2 * most), dpi=72, facecolor="white", layout=spaced)
        figure.suptitle(
            f"{landscape.title}\n{steps} steps from the ring, minima at the stars; "
            "arrived: within 0.1 % of the starting height",
            fontsize=12,
        )
        drawn: list[Line2D] = []
        for axes, (title, descents) in zip(figure.subplots(1, len(panels)), panels.items()):
            _draw_ground(axes, landscape)
            axes.set_title(title, fontsize=11)
            for descent, look in zip(descents, LOOKS):
                drawn += _draw_descent(axes, descent, look)
            axes.legend(
                loc="upper left",
                bbox_to_anchor=(0, -0.07),
                frameon=False,
                handlelength=4,
                borderaxespad=0,
                fontsize=10,
            )
        still = _svg(figure, landscape, steps)
        for line in drawn:
            line.set_visible(False)  # the legend keeps them
        empty = _svg(figure, landscape, steps)
        height = figure.bbox.height
        scenes = []
        for axes, descents in zip(figure.axes, panels.values()):
            frame = axes.bbox
            pixels = [
                axes.transData.transform(descent.points.numpy()) * (1, -1) + (0, height)
                for descent in descents
            ]
            scenes.append(((frame.x0, height - frame.y1, frame.width, frame.height), pixels))
    return still, animate(empty, scenes, steps)


def _draw_ground(axes: Axes, landscape: Landscape) -> None:
    left, right, bottom, top = landscape.window
    x, y = torch.linspace(left, right, 121).double(), torch.linspace(bottom, top, 121).double()
    height = landscape.value(x[None, :], y[:, None]) - landscape.lowest
    # By quantiles: as many contours on the floor as on walls.
    levels = height.flatten().quantile(torch.linspace(0, 1, LEVELS).double()).tolist()
    greys = [str(0.78 + 0.2 * level / LEVELS) for level in range(LEVELS)]  # the lower, the darker
    ground = axes.contourf(x, y, height, levels=levels, colors=greys)
    contours = axes.contour(x, y, height, levels=levels, colors="#9aa0a8", linewidths=0.6)
    for drawn in (ground, contours):
        drawn.set_rasterized(True)  # as paths they would be megabytes
    axes.plot(
        *landscape.start,
        "o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=1.4,
    )
    axes.plot(
        *zip(*landscape.minima),
        "*",
        markersize=15,
        color="black",
        markeredgecolor="white",
        linestyle="none",
        zorder=3,
    )
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _draw_descent(axes: Axes, descent: Descent, look: Look) -> tuple[Line2D, Line2D]:
    """Draw the path and a larger marker at its end; return both."""
    x, y = descent.points.unbind(1)
    (line,) = axes.plot(
        x.numpy(),
        y.numpy(),
        color=look.colour,
        linestyle=look.line,
        linewidth=1.8,
        marker=look.marker,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        markevery=0.12,  # of the axes' diagonal, along the path
        label=descent_in_words(descent),
    )
    (end,) = axes.plot(
        x[-1:].numpy(),
        y[-1:].numpy(),
        look.marker,
        color=look.colour,
        markersize=10,
        markeredgecolor="white",
    )
    return line, end


def _svg(figure: Figure, landscape: Landscape, steps: int) -> str:
    file = io.StringIO()
    metadata = {"Title": f"{landscape.title}, {steps} steps of each optimizer", "Date": None}
    figure.savefig(file, format="svg", dpi=GROUND_DPI, metadata=metadata)

    # without a size of its own it is as wide as its window
    def opening(found: re.Match[str]) -> str:
        return re.sub(r' (width|height)="[^"]*"', "", found[0]) + f"\n{DARK}"

    return re.sub(r"<svg [^>]*>", opening, file.getvalue(), count=1)
