"""Fine-tuning of small causal language models for chat and translation.

The names below are loaded when they are first used, so that `import finetune` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config import RunConfig, load_config
    from finetune.errors import UserError
    from finetune.optim import (
        LazyAdamW,
        build_lr_scheduler,
        build_optimizer,
        clip_grad_norm_,
        list_optimizers,
    )
    from finetune.recipes.train.train import run_training
    from finetune.report import write_report

__version__ = "0.1.0"

_HOMES = {
    "LazyAdamW": "finetune.optim",
    "RunConfig": "finetune.config",
    "UserError": "finetune.errors",
    "build_lr_scheduler": "finetune.optim",
    "build_optimizer": "finetune.optim",
    "clip_grad_norm_": "finetune.optim",
    "list_optimizers": "finetune.optim",
    "load_config": "finetune.config",
    "run_training": "finetune.recipes.train.train",
    "write_report": "finetune.report",
}

__all__ = [
    "LazyAdamW",
    "RunConfig",
    "UserError",
    "build_lr_scheduler",
    "build_optimizer",
    "clip_grad_norm_",
    "list_optimizers",
    "load_config",
    "run_training",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
