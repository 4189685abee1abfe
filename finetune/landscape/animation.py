"""From a still SVG and the path of each descent to an SVG in which the descents run, over and over.

The trail of a descent is its whole line under a mask. A growing stroke uncovers it, and the marker
moves at its head. The speed grows during a run, as the first steps are the interesting ones. A bar
at the foot fills evenly with the steps.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.markers import MarkerStyle

from finetune.report.svg import Look

LOOKS = (  # of the descents of a picture; Okabe and Ito's colours, without the yellow
    Look("#0072b2", (), "o"),
    Look("#d55e00", (7, 2.5), "s"),
    Look("#009e73", (2, 2), "^"),
    Look("#cc79a7", (8, 2, 2, 2), "D"),
    Look("#000000", (4, 2), "v"),
    Look("#e69f00", (), "X"),
    Look("#56b4e9", (6, 2, 1, 2, 1, 2), "P"),
)
SECONDS = 12.0  # that one run takes
HOLD = 0.2  # the share of a run that shows the end
FRAMES = 150  # key frames
SPEED_UP = 1.6  # exponent of the time
FAR = 4000.0  # points outside the picture to which a line is still drawn

Box = tuple[float, float, float, float]  # left, top, width, height


def animate(svg: str, scenes: Sequence[tuple[Box, Sequence[np.ndarray]]], steps: int) -> str:
    """Return `svg` with every path of every scene moving in it.

    A scene is a box of the picture and its paths, each [points, 2], all in the picture's points.
    """
    moving = (np.linspace(0, 1, round(FRAMES * (1 - HOLD))) ** SPEED_UP * steps).round().astype(int)
    # The step that each key frame shows.
    at = np.concatenate([moving, np.full(FRAMES - len(moving), steps)])
    parts = []
    for number, (box, paths) in enumerate(scenes):
        left, top, width, height = box
        rectangle = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
        parts.append(
            f'<clipPath id="scene{number}"><rect {rectangle}/></clipPath>'
            f'<g clip-path="url(#scene{number})">'
        )
        for line, (path, look) in enumerate(zip(paths, LOOKS)):
            parts.append(
                _descent(f"trail{number}-{line}", np.clip(path, -FAR, FAR), at, look, rectangle)
            )
        parts.append("</g>")
        filled = _animation("width", [f"{width * step / steps:.1f}" for step in at])
        bar = f'x="{left:.1f}" y="{top + height + 1:.1f}" width="{width:.1f}" height="3"'
        parts.append(f'<rect {bar} fill="#dfe1e4"/><rect {bar} fill="#5b6068">{filled}</rect>')
    return svg.replace("</svg>", "\n".join([*parts, "</svg>"]))


def _descent(name: str, path: np.ndarray, at: np.ndarray, look: Look, rectangle: str) -> str:
    """Return a trail and its head. If the path diverged, the frames after its end show its end."""
    at = np.minimum(at, len(path) - 1)
    along = np.concatenate([[0.0], np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()])
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    length = along[-1] + 1
    hidden = _animation("stroke-dashoffset", [f"{length - along[step]:.1f}" for step in at])
    moves = _animation(
        "transform", [f"{path[step][0]:.1f},{path[step][1]:.1f}" for step in at], translate=True
    )
    dashes = (
        f' stroke-dasharray="{" ".join(f"{1.8 * dash:g}" for dash in look.dashes)}"'
        if look.dashes
        else ""
    )
    shape = MarkerStyle(look.marker)
    corners = np.asarray(shape.get_path().transformed(shape.get_transform()).to_polygons()[0])
    head = " ".join(f"{9 * x:.2f},{-9 * y:.2f}" for x, y in corners)
    x, y = path[-1]
    return (
        f'<mask id="{name}" maskUnits="userSpaceOnUse" {rectangle}>'
        f'<polyline points="{line}" fill="none" stroke="white" stroke-width="4" '
        f'stroke-dasharray="{length:.1f} {length:.1f}">{hidden}</polyline></mask>\n'
        f'<polyline points="{line}" fill="none" stroke="{look.colour}" stroke-width="1.8"{dashes} '
        f'mask="url(#{name})"/>\n'
        f'<polygon points="{head}" fill="{look.colour}" stroke="white" stroke-width="0.6" '
        f'transform="translate({x:.1f},{y:.1f})">{moves}</polygon>'
    )


def _animation(attribute: str, values: Sequence[str], *, translate: bool = False) -> str:
    element = 'animateTransform type="translate"' if translate else "animate"
    timing = f'dur="{SECONDS:g}s" repeatCount="indefinite"'
    return f'<{element} attributeName="{attribute}" {timing} values="{";".join(values)}"/>'
