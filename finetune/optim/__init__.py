"""Optimizers by name, their parameter groups, clipping, and learning-rate schedules.

`build_optimizer` (factory) looks a name up (registry, catalogue), sorts a model's parameters into
groups (groups) and writes the name into the optimizer's state (stamp). A rule that torch does not
have is in a file of its own (lion, muon) or, for the exact lazy AdamW, in `lazy/`.

Names can be looked up without torch: what needs it is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from finetune.optim import catalogue as catalogue  # fills the registry
from finetune.optim.registry import (
    OptimizerInfo,
    is_adamw,
    list_optimizers,
    optimizer_info,
    optimizer_table,
    register_optimizer,
)

if TYPE_CHECKING:
    from finetune.optim.factory import build_optimizer, check_optimizer
    from finetune.optim.gradients import clip_grad_norm_
    from finetune.optim.lazy.adamw import LazyAdamW
    from finetune.optim.lazy.convert import adapt_state, from_adamw_state, to_adamw_state
    from finetune.optim.lazy_path import build_with_lazy_path, why_no_lazy_path
    from finetune.optim.schedules import SCHEDULES, build_lr_scheduler
    from finetune.optim.stamp import go_on_with, options_of, rule_of

_MODULES = {
    "factory": ("build_optimizer", "check_optimizer"),
    "gradients": ("clip_grad_norm_",),
    "lazy.adamw": ("LazyAdamW",),
    "lazy.convert": ("adapt_state", "from_adamw_state", "to_adamw_state"),
    "lazy_path": ("build_with_lazy_path", "why_no_lazy_path"),
    "schedules": ("SCHEDULES", "build_lr_scheduler"),
    "stamp": ("go_on_with", "options_of", "rule_of"),
}

__all__ = [
    "SCHEDULES",
    "LazyAdamW",
    "OptimizerInfo",
    "adapt_state",
    "build_lr_scheduler",
    "build_optimizer",
    "build_with_lazy_path",
    "check_optimizer",
    "clip_grad_norm_",
    "from_adamw_state",
    "go_on_with",
    "is_adamw",
    "list_optimizers",
    "optimizer_info",
    "optimizer_table",
    "options_of",
    "register_optimizer",
    "rule_of",
    "to_adamw_state",
    "why_no_lazy_path",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"finetune.optim.{module}"), name)
    raise AttributeError(f"module 'finetune.optim' has no attribute {name!r}")
