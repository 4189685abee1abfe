"""The learning rates that a search tries: its middle, its grid, and when to widen it."""

import math
from collections.abc import Mapping

from finetune.optim import optimizer_info

ADAMW_LR = {"random": 3e-3, "pretrained": 1e-4, "lora": 3e-4}
"""The middle of AdamW's grid, by what is trained: random weights, a pretrained model, adapters."""

TIMES_ADAMW = {
    "sgd": 300.0,
    "momentum": 30.0,
    "nesterov": 30.0,
    "adagrad": 10.0,
    "rmsprop": 1.0,
    "adam": 1.0,
    "adamw": 1.0,
    "sparse_adam": 1.0,
    "lazy_adamw": 1.0,
    "adamw_8bit": 1.0,
    "adafactor": 10.0,
    "lion": 0.1,
    "muon": 10.0,
    "schedule_free_adamw": 3.0,
}
"""The middle of each optimizer's grid divided by that of AdamW's.

SGD's is high because gradients are clipped to a norm of 1. Adam divides by their size, which undoes
the clipping; SGD does not. A grid that begins in the wrong place is widened.

Measured, the best of their grids in 40 steps of configs/tiny_chat.yaml: sgd 0.9, momentum 0.09,
adagrad 0.03, rmsprop 0.003, adam and adamw 0.009. On SmolLM2-135M SGD's grid is around 0.03, and
SGD at 0.9 diverged in 5 steps.
"""

MAX_WIDENINGS = 4  # learning rates added to one grid, at most: two decades
WEIGHT_DECAYS = (0.0, 0.01, 0.1)


def centre(name: str, start: str) -> float:
    """Return the middle of the grid of optimizer `name`.

    `start` is "random", "pretrained" or "lora". An optimizer that is not in the table has the
    default learning rate of its class.
    """
    if name in TIMES_ADAMW:
        return _rounded(ADAMW_LR[start] * TIMES_ADAMW[name])
    return float(optimizer_info(name).options["lr"])


def lr_grid(middle: float, count: int, *, highest: float = math.inf) -> list[float]:
    """Return `count` learning rates around `middle`, half a decade apart, none above `highest`.

    The factors are 3 and 10/3 in turn, so that the numbers are short. If `count` is even, one more
    of them is below the middle than above it. In the place of one above `highest` there is one more
    at the lower end.
    """
    first = -(count // 2)
    while _half_decades(middle, first + count - 1) > highest:
        first -= 1
    return [_half_decades(middle, k) for k in range(first, first + count)]


def _half_decades(middle: float, k: int) -> float:
    """Return the learning rate `k` half decades above `middle`."""
    return _rounded(middle * 10 ** (k // 2) * (3 if k % 2 else 1))


def wider(losses: Mapping[float, float]) -> float | None:
    """Return the learning rate to try next if the best so far is at an end of the grid, else None.

    `losses` has the loss of each learning rate tried, infinite if the run diverged. Of equal losses
    the lowest learning rate counts as the best. So a grid on which everything diverged goes on
    below. Fewer than three learning rates are never widened.
    """
    if len(losses) < 3:
        return None
    lrs = sorted(losses)
    best = min(lrs, key=lambda lr: losses[lr])
    if best == lrs[0]:
        return _rounded(lrs[1] / 10)
    return _rounded(lrs[-2] * 10) if best == lrs[-1] else None


def _rounded(lr: float) -> float:
    """Return three digits of `lr`, so that what is tried is what is shown."""
    return float(f"{lr:.3g}")
