"""Whether AdamW or Adam takes the lazy path, which steps a token table row by row.

The result is that of the dense optimizer, to rounding; only the cost differs. So a run that asks
for `adamw` or `adam` gets the path if the model's table allows it, and checkpoints of either resume
in the other.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from finetune.errors import UserError
from finetune.optim.factory import GROUP_OPTIONS, build_optimizer
from finetune.optim.lazy.eligible import sort_embeddings
from finetune.optim.lazy.missed_steps import GaussRules
from finetune.optim.registry import optimizer_info
from finetune.optim.stamp import stamp

Lazy = Literal["auto"] | bool

_WITH_LAZY_PATH = ("adamw", "adam")


def why_no_lazy_path(
    name: str, options: Mapping[str, Any], lazy: Lazy, *, sharded: bool = False
) -> str | None:
    """Return why an optimizer called `name` steps every row of any model, or None if it need not.

    `sharded`: an engine shards the parameters. Raises UserError if `lazy` contradicts the answer.
    """
    info = optimizer_info(name)
    if info.must_know == "embeddings":
        if lazy is False:
            raise UserError(
                f"optimizer.lazy is false, but optimizer.name is {info.name}. Name adamw to step "
                "every row, or leave optimizer.lazy out"
            )
        return None
    reason = _reason(info.name, {**info.options, **options}, lazy, sharded=sharded)
    if reason is not None and lazy is True:
        raise UserError(f"optimizer.lazy is true, but {reason}. Set it to auto or false")
    return reason


def build_with_lazy_path(
    model: nn.Module, name: str, lazy: Lazy, *, sharded: bool = False, **options: Any
) -> tuple[Optimizer, str]:
    """Return the optimizer called `name`, on the lazy path if it can take it, and a line about it.

    `options` are those of `build_optimizer`. The line is empty if there was nothing to choose.
    Raises UserError as `build_optimizer` and `why_no_lazy_path` do.
    """
    info = optimizer_info(name)
    reason = why_no_lazy_path(name, options, lazy, sharded=sharded)
    if info.name not in _WITH_LAZY_PATH:
        return build_optimizer(model, name, **options), ""
    if reason is None:
        chosen, others = sort_embeddings(model)
        if chosen:
            known = {*optimizer_info("lazy_adamw").options, *GROUP_OPTIONS}
            kept = {key: value for key, value in options.items() if key in known}
            decay = {"weight_decay": info.options["weight_decay"]}
            optimizer = build_optimizer(model, "lazy_adamw", **{**decay, **kept}, embeddings=chosen)
            stamp(optimizer, info.name)
            names = {module: name for name, module in model.named_modules()}
            tables = ", ".join(repr(names[module]) for module in chosen)
            return optimizer, f"{info.name} computes only the rows in use of {tables} (not tied)"
        reason = "; ".join(why for _, why in others) or "the model has no token table"
        if lazy is True:
            raise UserError(f"optimizer.lazy is true, but {reason}. Set it to auto or false")
    return build_optimizer(model, name, **options), f"{info.name} computes every row: {reason}"


def _reason(name: str, options: Mapping[str, Any], lazy: Lazy, *, sharded: bool) -> str | None:
    if name not in _WITH_LAZY_PATH:
        return f"{name} has no lazy path, which only adamw and adam have"
    if lazy is False:
        return "optimizer.lazy is false"
    if sharded and lazy == "auto":
        return "the engine shards the table"
    known = {*optimizer_info("lazy_adamw").options, *GROUP_OPTIONS}
    asked = [key for key, value in options.items() if value and key not in known]
    if asked:
        return f"{' and '.join(asked)} asks for torch's own {name}"
    if not _is_exact(options["betas"], options["eps"]):
        return f"betas {options['betas']} with eps {options['eps']} leave no exact lazy path"
    overrides = options.get("overrides") or ()
    decays = [options["weight_decay"], *(each.get("weight_decay") for each in overrides)]
    if name == "adam" and any(decays):
        return "adam's weight decay is a part of the gradient, so every row has one"
    return None


def _is_exact(betas: Any, eps: Any) -> bool:
    """Return whether missed steps can be made up; what is no number is refused elsewhere."""
    try:
        beta1, beta2 = map(float, betas)
        return float(eps) > 0 and GaussRules.supports((beta1, beta2))
    except (TypeError, ValueError):
        return False
