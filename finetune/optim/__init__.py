"""Optimizers by name, the exact lazy AdamW, clipping over dense and row-sparse gradients, learning-rate schedules.

Floor 1.
"""

from finetune.optim import catalogue as catalogue  # fills the registry
from finetune.optim.factory import build_optimizer, check_optimizer
from finetune.optim.gradients import clip_grad_norm_
from finetune.optim.lazy.adamw import LazyAdamW
from finetune.optim.registry import (
    OptimizerInfo,
    list_optimizers,
    optimizer_info,
    optimizer_table,
    register_optimizer,
)
from finetune.optim.schedules import SCHEDULES, build_lr_scheduler
from finetune.optim.stamp import options_of

__all__ = [
    "SCHEDULES",
    "LazyAdamW",
    "OptimizerInfo",
    "build_lr_scheduler",
    "build_optimizer",
    "check_optimizer",
    "clip_grad_norm_",
    "list_optimizers",
    "optimizer_info",
    "optimizer_table",
    "options_of",
    "register_optimizer",
]
