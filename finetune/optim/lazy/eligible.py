"""Which embeddings LazyAdamW takes, which options it takes, and a sentence for what it refuses."""

import contextlib
import logging
from typing import Any

from torch import Tensor, nn

from finetune.errors import UserError, did_you_mean
from finetune.optim.groups import is_compact
from finetune.optim.lazy.missed_steps import GaussRules
from finetune.optim.lazy.table import MISSED_STEPS

_logger = logging.getLogger("finetune")


def row_sparse_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """Return the embeddings of `model` whose rows `lazy_adamw` may step one by one.

    A table is row-sparse only if nothing but the lookup reads it. A table tied to the output head
    takes part in every logit, so each of its rows has a gradient at every step.

    It is the model's input embedding, if that is trainable and untied. If the model does not name
    one, it is every such nn.Embedding. (A position embedding next to a named input embedding stays
    dense: a batch uses nearly all of its rows.) The log of "finetune" reports why a table is not
    among them: a note for a frozen or compact one, else a warning.
    """
    chosen, others = sort_embeddings(model)
    for level, reason in others:
        _logger.log(level, "lazy_adamw: %s", reason)
    return chosen


def sort_embeddings(model: nn.Module) -> tuple[list[nn.Embedding], list[tuple[int, str]]]:
    """Return the row-sparse embeddings of `model`, and why its other tables are none.

    Each reason comes with its level of logging.
    """
    names = {module: name for name, module in model.named_modules()}
    chosen: list[nn.Embedding] = []
    others: list[tuple[int, str]] = []
    for embedding in _candidates(model):
        name = repr(names[embedding])
        sharing = ", ".join(repr(names[module]) for module in _also_holding(model, embedding))
        if is_compact(embedding):
            reason = (
                f"all rows of the compact embedding {name} are in use, so it is updated densely"
            )
            others.append((logging.INFO, reason))
        elif not embedding.weight.requires_grad:
            reason = f"the embedding {name} is frozen, so there are no rows to update"
            others.append((logging.INFO, reason))
        elif sharing:
            reason = (
                f"the embedding {name} shares its weight with {sharing}, so every row has a "
                "gradient and is updated, as by adamw; if few of them are used, the active "
                "vocabulary trains only those"
            )
            others.append((logging.WARNING, reason))
        elif why := _why_not_by_rows(embedding):
            reason = f"the embedding {name} is updated densely, as by adamw: {why}"
            others.append((logging.WARNING, reason))
        else:
            chosen.append(embedding)
    return chosen, others


def _candidates(model: nn.Module) -> list[nn.Embedding]:
    """Return the trainable embeddings that the model names as its input, else all that it has.

    Wrappers such as PEFT's `modules_to_save`, which also keep a frozen copy, are looked into.
    transformers' models of several inputs, or of sound, raise NotImplementedError: they name none.
    """
    get_embedding = getattr(model, "get_input_embeddings", None)
    named = None
    if callable(get_embedding):
        with contextlib.suppress(NotImplementedError):
            named = get_embedding()
    root = named if isinstance(named, nn.Module) else model
    found = [module for module in root.modules() if isinstance(module, nn.Embedding)]
    return [module for module in found if module.weight.requires_grad] or found


def _also_holding(model: nn.Module, embedding: nn.Embedding) -> list[nn.Module]:
    """Return the other modules that hold this weight, or another one over the same memory."""
    memory = embedding.weight.untyped_storage().data_ptr()
    return [
        module
        for module in model.modules()
        if module is not embedding
        for parameter in module.parameters(recurse=False)
        if parameter is embedding.weight
        or (memory and parameter.untyped_storage().data_ptr() == memory)
    ]


def check_embedding(module: nn.Embedding, *, in_group: bool) -> None:
    """Raise UserError if `module` cannot be stepped lazily.

    `in_group`: its weight is among the optimizer's parameters.
    """
    if not isinstance(module, nn.Embedding):
        raise UserError(
            f"embeddings takes nn.Embedding modules, not {type(module).__name__}. Leave it out"
            + (", and build it with sparse=False" if isinstance(module, nn.EmbeddingBag) else "")
        )
    why = _why_not_by_rows(module)
    if not module.weight.requires_grad:
        why = "its weight is frozen"
    elif not in_group:
        why = "its weight is not among the optimizer's parameters"
    _refuse(why)


def check_lookup(module: nn.Embedding) -> None:
    """Raise UserError if `module` looks rows up in a way that rules out steps of single rows."""
    if module.max_norm is not None or module.scale_grad_by_freq:
        _refuse(_why_not_by_rows(module))


def _refuse(why: str) -> None:
    if why:
        raise UserError(
            f"this embedding cannot be stepped lazily: {why}. Leave it out of `embeddings`"
        )


def _why_not_by_rows(module: nn.Embedding) -> str:
    """Return what about an embedding rules out steps of single rows, or ""."""
    reasons = {
        "its max_norm rewrites rows as they are read": module.max_norm is not None,
        "scale_grad_by_freq does not go with row-sparse gradients": module.scale_grad_by_freq,
        "its weight is complex": module.weight.is_complex(),
        "its weight is not a plain torch.nn.Parameter": type(module.weight) is not nn.Parameter
        and not hasattr(module.weight, "row_table"),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def check_mode(missed_steps: str) -> None:
    """Raise UserError for a mode that does not exist."""
    if missed_steps not in MISSED_STEPS:
        hint = did_you_mean(missed_steps, MISSED_STEPS)
        raise UserError(
            f"missed_steps={missed_steps!r} is not one of {', '.join(MISSED_STEPS)}{hint}"
        )


def check_missed_steps(missed_steps: str, betas: tuple[float, float], eps: float) -> None:
    """Raise UserError if the mode does not go with these options."""
    if missed_steps == "exact" and not (GaussRules.supports(betas) and eps > 0):
        raise UserError(
            f'missed_steps="exact" needs eps above 0 and betas[0] clearly below sqrt(betas[1]), '
            f'not eps={eps}, betas={betas}. Use missed_steps="replay", which takes any'
        )


def check_group(group: dict[str, Any]) -> None:
    """Raise UserError if an option of a parameter group is out of its range."""
    if not float(group["lr"]) >= 0:
        raise UserError(f"lr must be at least 0, not {group['lr']}")
    if not group["eps"] >= 0:
        raise UserError(f"eps must be at least 0, not {group['eps']}")
    if not all(0 <= beta < 1 for beta in floats(group["betas"])):
        raise UserError(f"betas must be at least 0 and below 1, not {group['betas']}")
    if not group["weight_decay"] >= 0:
        raise UserError(f"weight_decay must be at least 0, not {group['weight_decay']}")
    check_rule(group)


def check_rule(group: dict[str, Any]) -> None:
    """Raise UserError if a parameter group, own or saved, asks for another rule than AdamW's."""
    if group.get("amsgrad"):
        raise UserError(
            "a parameter group has amsgrad=True, which LazyAdamW does not have. Use "
            "torch.optim.AdamW, or a group and a state without amsgrad"
        )
    if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
        raise UserError(
            f"a parameter group is of Adam with weight_decay={group['weight_decay']}, which Adam "
            "adds to the gradient, and LazyAdamW does not. Go on with torch.optim.Adam, or use "
            "weight_decay=0"
        )


def floats(betas: tuple[float | Tensor, float | Tensor]) -> tuple[float, float]:
    """Return both betas as Python floats."""
    return float(betas[0]), float(betas[1])
