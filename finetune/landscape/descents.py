"""An optimizer's way down a landscape: at its default learning rate, and at the best of a grid.

The default is the factory's. The grid is the same for all optimizers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.landscape.functions import Landscape
from finetune.optim import build_optimizer, optimizer_info

LEARNING_RATES = (
    *(float(f"{mantissa}e{exponent}") for exponent in range(-5, 1) for mantissa in (1, 2, 5)),
    10.0,
)
CLOSE = 1e-3  # a descent has arrived below this share of the height of its start
LOST = 1e6  # a descent with a coordinate beyond this has diverged


@dataclass(frozen=True)
class Descent:
    """One optimizer's way down one landscape."""

    optimizer: str
    lr: float
    points: Tensor  # [steps + 1, 2], from the start on; fewer if the descent diverged
    height: float  # above the minimum, the mean of the last tenth of the points
    settled: int | None  # the step from which on it stayed close to a minimum's height
    diverged: bool


def check_descent(name: str) -> None:
    """Raise UserError if the optimizer called `name` cannot descend a landscape.

    It may be unknown, not installed, made for matrices or for sparse gradients, or have weights of
    its own besides those that it steps.
    """
    info = optimizer_info(name)
    if info.second_weights:
        raise UserError(
            f"optimizer {info.name!r} takes its gradients at one point and is evaluated at "
            "another, and a landscape shows one. Choose another optimizer"
        )
    info.load()
    if info.sparse == "lazy" or info.must_know != "nothing":
        raise UserError(
            f"optimizer {info.name!r} is made for a model's matrices, and a landscape has only two "
            "numbers. Choose another optimizer"
        )


def descend(landscape: Landscape, name: str, lrs: Sequence[float], steps: int) -> list[Descent]:
    """Return the descent of `steps` steps in float64 at each of `lrs`.

    Options other than the learning rate are the optimizer's defaults. The descents are independent.
    They are groups of one optimizer only because that is faster.
    """
    positions = [
        torch.tensor(landscape.start, dtype=torch.float64, requires_grad=True) for _ in lrs
    ]
    optimizer = build_optimizer(
        [{"params": [position], "lr": lr} for position, lr in zip(positions, lrs)], name
    )
    paths = [torch.stack(positions).detach()]
    for _ in range(steps):
        optimizer.zero_grad()
        landscape.value(*torch.stack(positions).unbind(1)).sum().backward()
        optimizer.step()
        paths.append(torch.stack(positions).detach())
    return [
        _descent(landscape, name, lr, points) for lr, points in zip(lrs, torch.stack(paths, dim=1))
    ]


def _descent(landscape: Landscape, name: str, lr: float, points: Tensor) -> Descent:
    lost = ~(points.abs() <= LOST).all(1)  # NaN is lost too
    if lost.any():
        return Descent(name, lr, points[: int(lost.nonzero()[0])], math.inf, None, diverged=True)
    heights = landscape.value(*points.unbind(1)) - landscape.lowest
    end = float(heights[-max(1, len(heights) // 10) :].mean())  # one point may be low by luck
    return Descent(name, lr, points, end, settles(heights), diverged=False)


def settles(heights: Tensor) -> int | None:
    """Return the first step from which on no height is above CLOSE of the first one, or None."""
    far = (heights > CLOSE * heights[0]).nonzero()
    step = int(far[-1]) + 1 if len(far) else 0
    return step if step < len(heights) else None


def descend_by_default(landscape: Landscape, name: str, steps: int) -> Descent:
    """Return the descent at the factory's default learning rate."""
    return descend(landscape, name, [optimizer_info(name).options["lr"]], steps)[0]


def descend_tuned(landscape: Landscape, name: str, steps: int) -> Descent:
    """Return the best descent over LEARNING_RATES.

    It is the first to settle or, if none does, the one that ends lowest.
    """
    return min(
        descend(landscape, name, LEARNING_RATES, steps),
        key=lambda d: (steps + 1 if d.settled is None else d.settled, d.height),
    )
