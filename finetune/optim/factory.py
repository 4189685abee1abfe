"""`build_optimizer`: from a name and options to an optimizer over a model's parameter groups."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim.groups import build_groups, check_group_options
from finetune.optim.lazy.eligible import row_sparse_embeddings
from finetune.optim.registry import (
    GROUP_OPTIONS,
    OptimizerInfo,
    check_options,
    check_step,
    optimizer_info,
)
from finetune.optim.stamp import stamp

_logger = logging.getLogger("finetune")


def build_optimizer(
    model_or_params: nn.Module | Iterable[Any],
    name: str,
    *,
    no_decay: Sequence[str] | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
    layer_decay: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Return the optimizer called `name` over a model or its parameters.

    Parameters may also be (name, parameter) pairs or torch's group dicts. `options` are those of
    `optimizer_info(name).options` (lr, weight_decay, betas ...), with that optimizer's own
    defaults. `no_decay` (default: biases, norms and embeddings), `overrides` and `layer_decay`
    shape the groups, see `groups.build_groups`. Every group holds its final lr and weight_decay,
    its name and its parameters' names.

    Raises UserError for an unknown name, option or value. Each group also holds the optimizer's
    name, and a checkpoint keeps it, so loading the state of another optimizer raises UserError too.
    """
    info = optimizer_info(name)
    takes = info.options
    check_options(info, options, allowed=[*takes, *GROUP_OPTIONS])
    options = {option: value for option, value in options.items() if option in takes}
    groups = build_groups(
        model_or_params,
        lr=options.get("lr", takes["lr"]),
        weight_decay=options.get("weight_decay", takes.get("weight_decay")),
        no_decay=no_decay,
        overrides=overrides,
        layer_decay=layer_decay,
        split_matrices=info.must_know == "hidden matrices",
    )
    if info.must_know == "embeddings" and "embeddings" not in options:
        options["embeddings"] = _embeddings(model_or_params)
    if _can_fuse(info, options, groups):
        options["fused"] = True
    optimizer = info.load()(groups, **{**info.preset, **info.fixed, **options})
    stamp(optimizer, info.name)
    return optimizer


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Raise the UserError that build_optimizer would raise, before there is a model."""
    info = optimizer_info(name)
    if "embeddings" in options:
        raise UserError(
            "the option embeddings takes modules, which a config cannot name. Leave it out: those "
            "of the model are found"
        )
    own = {key: value for key, value in options.items() if key not in GROUP_OPTIONS}
    check_options(info, own, allowed=[*info.config_options, *GROUP_OPTIONS])
    if info.takes_dense:
        check_step(info, own)
    check_group_options(
        no_decay=options.get("no_decay") or (),
        overrides=options.get("overrides") or (),
        layer_decay=options.get("layer_decay"),
        takes_decay="weight_decay" in info.options,
    )


def _embeddings(model_or_params: nn.Module | Iterable[Any]) -> list[nn.Embedding]:
    if isinstance(model_or_params, nn.Module):
        return row_sparse_embeddings(model_or_params)
    _logger.warning(
        "lazy_adamw was given parameters, not a model, so it knows no embedding and updates every "
        "row. Give it the model"
    )
    return []


def _can_fuse(
    info: OptimizerInfo, options: Mapping[str, Any], groups: list[dict[str, Any]]
) -> bool:
    """Return whether torch's fused kernel pays here, and is right.

    It is if no other kernel was asked for and every parameter is a contiguous float. torch 2.13's
    CPU kernel ignores strides: the result is wrong for a parameter laid out unlike its gradient.
    """
    if not info.fused_pays or options.keys() & {"fused", "foreach", "capturable", "differentiable"}:
        return False
    parameters = [
        item[1] if isinstance(item, tuple) else item for group in groups for item in group["params"]
    ]
    return all(
        p.is_floating_point() and p.is_contiguous() and p.device.type in ("cpu", "cuda")
        for p in parameters
    )
