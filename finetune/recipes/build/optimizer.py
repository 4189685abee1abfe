"""From the optimizer and the scheduler section of a config to the objects."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetune.config import RunConfig
from finetune.errors import UserError
from finetune.optim import build_lr_scheduler, build_optimizer, optimizer_info


def make_optimizer(model: nn.Module, config: RunConfig) -> Optimizer:
    """Return the optimizer of the config's `optimizer` section for `model`. Raises UserError."""
    return build_optimizer(model, config.optimizer.name, **optimizer_options(config))


def make_scheduler(optimizer: Optimizer, config: RunConfig, num_steps: int) -> LambdaLR:
    """Return the learning rate's schedule over the `num_steps` optimizer steps of a whole run."""
    section = config.scheduler
    warmup = section.warmup_steps
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
