"""`build_optimizer`: from a name and options to an optimizer over a model's parameter groups."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim.fused import can_fuse, leave_fused_when_wrong
from finetune.optim.groups import build_groups, check_group_options
from finetune.optim.lazy.eligible import row_sparse_embeddings
from finetune.optim.registry import (
    GROUP_OPTIONS,
    as_plain,
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
    source, options = as_plain(model_or_params), as_plain(options)
    overrides, layer_decay = as_plain(overrides), as_plain(layer_decay)
    check_options(info, options, allowed=[*takes, *GROUP_OPTIONS])
    options = {option: value for option, value in options.items() if option in takes}
    groups = build_groups(
        source,
        lr=options.get("lr", takes["lr"]),
        weight_decay=options.get("weight_decay", takes.get("weight_decay")),
        no_decay=no_decay,
        overrides=overrides,
        layer_decay=layer_decay,
        split_matrices=info.must_know == "hidden matrices",
    )
    if info.must_know == "embeddings" and "embeddings" not in options:
        options["embeddings"] = _embeddings(source)
    if can_fuse(info, options, groups):
        options["fused"] = True
    optimizer = info.load()(groups, **{**info.preset, **info.fixed, **options})
    if "fused" in optimizer.defaults:
        leave_fused_when_wrong(optimizer)
    stamp(optimizer, info.name)
    return optimizer


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Raise the UserError that build_optimizer would raise, before there is a model."""
    info = optimizer_info(name)
    options = as_plain(options)
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
