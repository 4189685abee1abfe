"""Fine-tuning of small causal language models for chat and translation.

The names below are loaded when they are first used, so that `import finetune` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.api import LoadedModel, RunResult, load, train
    from finetune.config import RunConfig, load_config
    from finetune.errors import UserError
    from finetune.optim import (
        LazyAdamW,
        build_lr_scheduler,
        build_optimizer,
        clip_grad_norm_,
        list_optimizers,
    )
    from finetune.report import write_report

__version__ = "0.1.0"

_HOMES = {
    "LazyAdamW": "finetune.optim",
    "LoadedModel": "finetune.api",
    "RunConfig": "finetune.config",
    "RunResult": "finetune.api",
    "UserError": "finetune.errors",
    "build_lr_scheduler": "finetune.optim",
    "build_optimizer": "finetune.optim",
    "clip_grad_norm_": "finetune.optim",
    "list_optimizers": "finetune.optim",
    "load": "finetune.api",
    "load_config": "finetune.config",
    "train": "finetune.api",
    "write_report": "finetune.report",
}

__all__ = [
    "LazyAdamW",
    "LoadedModel",
    "RunConfig",
    "RunResult",
    "UserError",
    "build_lr_scheduler",
    "build_optimizer",
    "clip_grad_norm_",
    "list_optimizers",
    "load",
    "load_config",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
