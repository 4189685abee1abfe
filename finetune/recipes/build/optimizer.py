"""From the optimizer and the scheduler section of a config to the objects."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetune.config import RunConfig
from finetune.errors import UserError
from finetune.optim import (
    build_lr_scheduler,
    build_with_lazy_path,
    is_adamw,
    optimizer_info,
    why_no_lazy_path,
)
from finetune.training.clock import TICKS

_LOW_FOR_LORA = 5e-5  # the default of other training


def make_optimizer(
    model: nn.Module,
    config: RunConfig,
    *,
    sharded: bool = False,
    note: Callable[[str], object] = lambda line: None,
) -> Optimizer:
    """Return the optimizer of the config's `optimizer` section for `model`.

    `sharded`: an engine shards the parameters. `note` is given the line that says which path was
    chosen and why, if there was a choice. Raises UserError.
    """
    section = config.optimizer
    optimizer, line = build_with_lazy_path(
        model, section.name, section.lazy, sharded=sharded, **optimizer_options(config)
    )
    if line:
        note(f"optimizer: {line}")
    return optimizer


def may_be_lazy(config: RunConfig, *, sharded: bool = False) -> bool:
    """Return whether the config's optimizer steps an untied input table row by row."""
    section = config.optimizer
    options = optimizer_options(config)
    return why_no_lazy_path(section.name, options, section.lazy, sharded=sharded) is None


def make_scheduler(optimizer: Optimizer, config: RunConfig, num_steps: int) -> LambdaLR:
    """Return the learning rate's schedule over the `num_steps` optimizer steps of a whole run.

    With `training.max_time` it is over the ticks of the clock. Raises UserError if that is to be
    warmed up for a number of steps.
    """
    section = config.scheduler
    warmup = section.warmup_steps
    if config.training.max_time is not None:
        if warmup is not None:
            raise UserError(
                "scheduler.warmup_steps counts steps, and with training.max_time the schedule "
                "follows the clock. Set scheduler.warmup_ratio instead"
            )
        num_steps = TICKS
    if warmup is None:
        warmup = math.ceil(section.warmup_ratio * num_steps)
    return build_lr_scheduler(
        optimizer,
        section.name,
        num_steps=num_steps,
        warmup_steps=min(warmup, num_steps),
        min_lr_ratio=section.min_lr_ratio,
    )


def longer_warmup(config: RunConfig, num_steps: int) -> str | None:
    """Return a sentence if the warm-up that the config asks for is longer than the run."""
    asked = config.scheduler.warmup_steps
    if asked is None or asked <= num_steps:
        return None
    return (
        f"the warm-up of {asked:,} steps (scheduler.warmup_steps) is longer than the run: it is "
        f"shortened to the run's {num_steps:,} steps, and the last of them has the full learning "
        "rate"
    )


def low_rate(config: RunConfig) -> str | None:
    """Return a sentence if AdamW trains LoRA at the default rate of other training, or less."""
    section = config.optimizer
    if config.model.lora is None or not is_adamw(section.name):
        return None
    if section.lr > _LOW_FOR_LORA:
        return None
    return (
        f"optimizer.lr is {section.lr:g}, at which LoRA learns slowly. Set about ten times the "
        "rate of full training, such as optimizer.lr=5e-4"
    )


def optimizer_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of `build_optimizer`.

    Raises UserError for an optimizer that cannot train a language model.
    """
    section = config.optimizer
    if not optimizer_info(section.name).takes_dense:
        raise UserError(
            f"optimizer {section.name!r} takes only row-sparse gradients, and most gradients of a "
            "language model are dense. Choose lazy_adamw, which takes both"
        )
    groups = {
        "no_decay": section.no_decay,
        "overrides": section.overrides,
        "layer_decay": section.layer_decay,
    }
    decay = {} if section.weight_decay is None else {"weight_decay": section.weight_decay}
    return {"lr": section.lr, **decay, **groups, **section.options}
