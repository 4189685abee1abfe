"""What LazyAdamW takes and what it refuses, each refusal one sentence.  Floor 1."""

from typing import Any

from torch import Tensor, nn

from finetune.errors import UserError, did_you_mean
from finetune.optim.missed_steps import GaussRules
from finetune.optim.row_table import MISSED_STEPS


def floats(betas: tuple[float | Tensor, float | Tensor]) -> tuple[float, float]:
    return float(betas[0]), float(betas[1])


def check_options(group: dict[str, Any]) -> None:
    if not float(group["lr"]) >= 0:
        raise UserError(f"lr must be at least 0, not {group['lr']}")
    if not group["eps"] >= 0:
        raise UserError(f"eps must be at least 0, not {group['eps']}")
    if not all(0 <= beta < 1 for beta in floats(group["betas"])):
        raise UserError(f"betas must be at least 0 and below 1, not {group['betas']}")
    if not group["weight_decay"] >= 0:
        raise UserError(f"weight_decay must be at least 0, not {group['weight_decay']}")


def check_missed_steps(missed_steps: str, betas: tuple[float, float], eps: float) -> None:
    if missed_steps == "exact" and not (GaussRules.supports(betas) and eps > 0):
        raise UserError(
            f'missed_steps="exact" needs eps above 0 and betas[0] clearly below sqrt(betas[1]), not eps={eps}, betas={betas}; '
            f'missed_steps="replay" takes any'
        )


def check_embedding(module: nn.Embedding, *, in_group: bool) -> None:
    if not isinstance(module, nn.Embedding):
        raise UserError(f"embeddings takes nn.Embedding modules, not {type(module).__name__}")
    reasons = {
        "its max_norm rewrites rows as they are read": module.max_norm is not None,
        "scale_grad_by_freq does not go with row-sparse gradients": module.scale_grad_by_freq,
        "its weight is complex": module.weight.is_complex(),
        "its weight is frozen": not module.weight.requires_grad,
        "its weight is not among the optimizer's parameters": not in_group,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"this embedding cannot be stepped lazily: {reason}")


def check_mode(missed_steps: str) -> None:
    """Raise UserError for a mode that does not exist."""
    if missed_steps not in MISSED_STEPS:
        hint = did_you_mean(missed_steps, MISSED_STEPS)
        raise UserError(
            f"missed_steps={missed_steps!r} is not one of {', '.join(MISSED_STEPS)}{hint}"
        )
