"""From the optimizer section of a config to the optimizer factory."""

from typing import Any

from finetune.config import RunConfig
from finetune.errors import UserError
from finetune.optim import optimizer_info


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
