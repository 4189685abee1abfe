"""What an optimizer's groups were told, apart from what it keeps count of in them. Floor 1."""

from typing import Any

import torch

from finetune.optim.registry import optimizer_info
from finetune.optim.stamp import KEY


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each group of an optimizer that `build_optimizer` made: lr, weight_decay, betas ...

    `load_state_dict` puts those of the saved state in their place, as torch does, together with what some optimizers count in their
    groups (schedule-free its weights' sum); `group.update` with these gives the groups their own options back, and no more.
    """
    names = optimizer_info(optimizer.defaults[KEY]).options
    return [
        {name: group[name] for name in names if name in group} for group in optimizer.param_groups
    ]
