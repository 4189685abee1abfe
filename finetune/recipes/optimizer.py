"""From the optimizer section of a config to the factory.

Floor 5.
"""

from typing import Any

from finetune.config import RunConfig


def optimizer_options(config: RunConfig) -> dict[str, Any]:
    """What `build_optimizer` takes beside the name."""
    section = config.optimizer
    groups = {"no_decay": section.no_decay, "overrides": section.overrides, "layer_decay": section.layer_decay}
    decay = {} if section.weight_decay is None else {"weight_decay": section.weight_decay}
    return {"lr": section.lr, **decay, **groups, **section.options}
