"""The functions, each with its minima, the start of a descent, and the window that is drawn.

Beale, Rosenbrock and Rastrigin are those of https://www.sfu.ca/~ssurjano/optimization.html. The
valley and the saddle follow Alec Radford's animations
(https://cs231n.github.io/neural-networks-3/).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Position = tuple[float, float]


@dataclass(frozen=True)
class Landscape:
    """A function of (x, y), elementwise over tensors.

    Its lowest value is `lowest`. It has this value at `minima` and nowhere else.
    """

    name: str
    title: str
    value: Callable[[Tensor, Tensor], Tensor]
    minima: tuple[Position, ...]
    lowest: float
    start: Position
    window: tuple[float, float, float, float]  # left, right, bottom, top


def beale(x: Tensor, y: Tensor) -> Tensor:
    """Return Beale\'s function."""
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """Return Rosenbrock\'s function."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def rastrigin(x: Tensor, y: Tensor) -> Tensor:
    """Return Rastrigin\'s function."""
    return 20 + x**2 - 10 * (2 * math.pi * x).cos() + y**2 - 10 * (2 * math.pi * y).cos()


def valley(x: Tensor, y: Tensor) -> Tensor:
    """Return a quadratic with curvatures 0.01 and 1: condition number 100."""
    return (0.01 * x**2 + y**2) / 2


def saddle(x: Tensor, y: Tensor) -> Tensor:
    """Return a function with a saddle at (0, 0) and two minima, at which a descent can arrive."""
    return x**2 / 2 - y**2 / 2 + y**4 / 4


LANDSCAPES = {
    landscape.name: landscape
    for landscape in (
        Landscape(
            "beale",
            "Beale: flat plains around steep walls",
            beale,
            ((3.0, 0.5),),
            0.0,
            (0.8, 1.6),
            (-1.0, 4.2, -1.8, 2.1),
        ),
        Landscape(
            "rosenbrock",
            "Rosenbrock: a bent valley",
            rosenbrock,
            ((1.0, 1.0),),
            0.0,
            (-1.5, 2.0),
            (-2.1, 2.1, -0.8, 3.0),
        ),
        Landscape(
            "rastrigin",
            "Rastrigin: many local minima",
            rastrigin,
            ((0.0, 0.0),),
            0.0,
            (-2.3, 3.4),
            (-4.2, 4.2, -4.2, 4.2),
        ),
        Landscape(
            "valley",
            "A long valley: condition number 100",
            valley,
            ((0.0, 0.0),),
            0.0,
            (-9.0, 1.6),
            (-10.5, 3.5, -2.4, 2.4),
        ),
        Landscape(
            "saddle",
            "A saddle, left by a hair",
            saddle,
            ((0.0, 1.0), (0.0, -1.0)),
            -0.25,
            (1.2, 0.001),
            (-0.9, 1.5, -1.35, 1.35),
        ),
    )
}
