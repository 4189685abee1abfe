"""The descents as pictures: for each landscape a still SVG and an animated one, both in one self-contained file without scripts.

Floor 1. matplotlib draws the still; the animation is the same drawing with its lines replaced by SVG's own animation elements
(SMIL, https://www.w3.org/TR/SVG11/animate.html), so that it also moves as an image in a page. Where nothing can move, it shows
the end. Methods differ in colour (Okabe and Ito, https://jfly.uni-koeln.de/color/), dashes and marker.
"""

import io
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
from finetune.landscape.animation import animate
from finetune.landscape.descents import (
    GRID,
    Descent,
    check_descent,
    descend_by_default,
    descend_tuned,
)
from finetune.landscape.functions import LANDSCAPES, Landscape
from finetune.landscape.looks import LOOKS, Look

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "finetune",  # the same descents give the same file
    "font.size": 10,
    "axes.edgecolor": "#9a9fa6",
    "axes.linewidth": 0.8,
    "xtick.color": "#5b6068",
    "ytick.color": "#5b6068",
}
LEVELS = 11  # contour lines
GROUND_DPI = 110  # of the contours; everything else is lines and text


def draw_landscapes(
    output: Path,
    *,
    functions: Sequence[str],
    optimizers: Sequence[str],
    steps: int,
    said: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write NAME.svg and NAME-animated.svg for each of `functions` into `output` and return the paths.

    Every optimizer makes `steps` steps from the same start: once at the factory's default learning rate, once at the best of a grid
    that is the same for all. `said` hears each descent in words. Raises UserError for an unknown function, for an optimizer that is
    unknown or needs a model, and for more optimizers than can be told apart.
    """
    _check(functions, optimizers, steps)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for landscape in (LANDSCAPES[function] for function in functions):
        panels = {
            "at the default learning rates": [
                descend_by_default(landscape, name, steps) for name in optimizers
            ],
            f"at the best of the same {len(GRID)} learning rates, {_number(GRID[0])} to {_number(GRID[-1])}": [
                descend_tuned(landscape, name, steps) for name in optimizers
            ],
        }
        said(landscape.title)
        for title, descents in panels.items():
            said(f"  {title}")
            for descent in descents:
                said(f"    {in_words(descent)}")
        still, animated = draw(landscape, panels, steps)
        for suffix, svg in (("", still), ("-animated", animated)):
            written.append(output / f"{landscape.name}{suffix}.svg")
            written[-1].write_text(svg, encoding="utf-8")
    return written


def _check(functions: Sequence[str], optimizers: Sequence[str], steps: int) -> None:
    for function in functions:
        if function not in LANDSCAPES:
            near = did_you_mean(function, LANDSCAPES) or ";"
            raise UserError(
                f"there is no landscape {function!r}{near} the landscapes are {', '.join(LANDSCAPES)}"
            )
    for name in optimizers:
        check_descent(name)
    if not 1 <= len(optimizers) <= len(LOOKS) or len(set(optimizers)) < len(optimizers):
        given = ", ".join(optimizers) or "none"
        raise UserError(
            f"optimizers {given}: a picture shows 1 to {len(LOOKS)} different ones; name fewer, or draw twice"
        )
    if not functions:
        raise UserError(f"no landscape was named; the landscapes are {', '.join(LANDSCAPES)}")
    if steps < 1:
        raise UserError(f"--steps is {steps}; take at least 1")


def in_words(descent: Descent) -> str:
    """Which optimizer, at which learning rate, and where it came to."""
    edge = " (an end of the grid)" if descent.lr in (GRID[0], GRID[-1]) else ""
    if descent.diverged:
        end = f"diverges at step {len(descent.points)}"
    elif descent.settled is not None:
        end = f"arrives at step {descent.settled}"
    else:
        end = f"ends {descent.height:.2g} above the minimum"
    return f"{descent.optimizer}, lr {_number(descent.lr)}{edge}: {end}"


def _number(lr: float) -> str:
    return f"{lr:g}".replace("e-0", "e-")


def draw(landscape: Landscape, panels: dict[str, list[Descent]], steps: int) -> tuple[str, str]:
    """Return the still and the animated SVG of one landscape, a panel for each entry of `panels`."""
    rows = max(len(descents) for descents in panels.values())
    with mpl.rc_context(STYLE):
        spaced = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)  # inches
        figure = Figure(figsize=(11, 5.6 + 0.2 * rows), dpi=72, facecolor="white", layout=spaced)
        figure.suptitle(
            f"{landscape.title}\n{steps} steps from the ring, minima at the stars; arrived: within 0.1 % of the starting height",
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
    levels = (
        height.flatten().quantile(torch.linspace(0, 1, LEVELS).double()).tolist()
    )  # as many contours on the floor as on walls
    greys = [str(0.78 + 0.2 * level / LEVELS) for level in range(LEVELS)]  # the lower, the darker
    axes.contourf(x, y, height, levels=levels, colors=greys).set_rasterized(
        True
    )  # as paths they are megabytes
    axes.contour(x, y, height, levels=levels, colors="#9aa0a8", linewidths=0.6).set_rasterized(True)
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
    """The way and, larger, where it ends."""
    x, y = descent.points.unbind(1)
    (line,) = axes.plot(
        x.numpy(),
        y.numpy(),
        color=look.colour,
        linestyle=(0, look.dashes) if look.dashes else "solid",
        linewidth=1.8,
        marker=look.marker,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        markevery=0.12,  # of the axes' diagonal, along the path
        label=in_words(descent),
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
    return file.getvalue()
