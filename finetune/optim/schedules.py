"""Learning-rate schedules: a pure function of the step, and the LambdaLR that multiplies lr by it.

Warm-up and inverse square root: https://arxiv.org/abs/1706.03762, section 5.3.
Cosine: https://arxiv.org/abs/1608.03983.
"""

import functools
import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from finetune.errors import UserError, did_you_mean

SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")


def multiplier(
    step: int, *, name: str, num_steps: int, warmup_steps: int, min_lr_ratio: float
) -> float:
    """Return the factor on lr at `step`, counted from 0 to num_steps - 1.

    Warm-up is (step + 1) / warmup_steps, so no step has lr 0. Then `linear` and `cosine` fall from
    1, at step warmup_steps, to `min_lr_ratio`, which they would reach at step num_steps, one after
    the last. `inverse_sqrt` is sqrt(warmup_steps / (step + 1)), but at least `min_lr_ratio`.
    `constant` stays at 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    if name == "inverse_sqrt":
        return max(min_lr_ratio, math.sqrt(max(1, warmup_steps) / (step + 1)))
    progress = (step - warmup_steps) / (num_steps - warmup_steps) if step < num_steps else 1.0
    fall = 1 - progress if name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return min_lr_ratio + (1 - min_lr_ratio) * fall


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    num_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
) -> LambdaLR:
    """Return a scheduler that multiplies every group's own lr, to step after each optimizer step.

    Raises UserError for an unknown name or a value out of range.
    """
    if name not in SCHEDULES:
        near = did_you_mean(name, SCHEDULES)
        raise UserError(
            f"there is no schedule {name!r}; the schedules are {', '.join(SCHEDULES)}{near}"
        )
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; a schedule needs at least one step")
    if not 0 <= warmup_steps <= num_steps:
        raise UserError(
            f"warmup_steps is {warmup_steps}; it must lie between 0 and the run's {num_steps} steps"
        )
    if not 0 <= min_lr_ratio <= 1:
        raise UserError(f"min_lr_ratio is {min_lr_ratio}; it must lie between 0 and 1")
    factor = functools.partial(
        multiplier,
        name=name,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        min_lr_ratio=min_lr_ratio,
    )
    return LambdaLR(optimizer, factor)
