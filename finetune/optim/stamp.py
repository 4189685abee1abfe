"""The optimizer's name in its own state, and the options of its groups.

The name keeps a checkpoint from being loaded into another optimizer. torch matches states by
position alone: `Adam` takes the state of `AdamW` and becomes it, and `SGD` takes it and fails a
step later (seen in torch 2.13). The stamp is the plain group key "optimizer", which survives
state_dict, pickle, deepcopy, weights_only and wrappers. The check is a load hook of torch's, which
has two limits. torch leaves hooks behind when an optimizer object is itself copied or pickled, and
bitsandbytes (0.50) has a load_state_dict of its own, which calls none.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from finetune.errors import UserError
from finetune.optim.registry import list_optimizers, optimizer_info

KEY = "optimizer"


def stamp(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Write `name` into every group, and refuse the state of any other optimizer from now on.

    Groups that are added later get the name too.
    """
    optimizer.defaults[KEY] = name
    for group in optimizer.param_groups:
        group[KEY] = name
    optimizer.register_load_state_dict_pre_hook(_refuse_another)
    # An attribute of the object: a class of ours would not be the one that was asked for.
    optimizer.add_param_group = functools.partial(  # type: ignore[method-assign]
        _add_named, optimizer, type(optimizer).add_param_group
    )


def _add_named(
    optimizer: torch.optim.Optimizer, add: Callable[..., None], param_group: dict[str, Any]
) -> None:
    """Add a group as torch does, and give its parameters names if they have none.

    torch refuses a group without names beside groups that have them, and the factory's have.
    """
    group = dict(param_group)
    params = group["params"]
    if isinstance(params, torch.Tensor):
        params = [params]
    elif not isinstance(params, (list, tuple, set)):
        params = list(params)
    named = optimizer.param_groups and "param_names" in optimizer.param_groups[0]
    if named and not isinstance(params, set) and isinstance(next(iter(params), None), torch.Tensor):
        count = sum(len(other["params"]) for other in optimizer.param_groups)
        params = [(f"added.{count + i}", param) for i, param in enumerate(params)]
    add(optimizer, {**group, "params": params})


def rule_of(name: str) -> str:
    """Return the name that stands for all optimizers with the same result as that called `name`."""
    infos = [optimizer_info(name)] if name in list_optimizers() else []
    return next((info.rule for info in infos if info.rule), name)


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group of an optimizer that `build_optimizer` made: lr, betas ...

    `load_state_dict` replaces them by those of the saved state, as torch does, together with what
    some optimizers count in their groups (schedule-free sums its weights). `group.update` with
    these gives the groups their own options back, and leaves the counts.
    """
    names = optimizer_info(optimizer.defaults[KEY]).options
    return [
        {name: group[name] for name in names if name in group} for group in optimizer.param_groups
    ]


def _refuse_another(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return `state_dict` with the stamp in each group.

    Raises UserError if it is of another rule or of other parameters. A state without a stamp comes
    from a bare torch optimizer; it is taken if its groups show the same rule.
    """
    name = optimizer.defaults[KEY]
    ours, saved = optimizer.param_groups, state_dict["param_groups"]
    found = {
        group.get(KEY) or (name if _same_rule(ours[0], group) else "another optimizer")
        for group in saved
    }
    lags = any("last_step" in entry for entry in state_dict["state"].values())
    if found != {name}:
        raise UserError(
            f"the saved optimizer state is of {', '.join(sorted(found - {name}))}, but this run "
            f"uses {name}. Resume with the same optimizer, or start again from the weights alone"
        )
    if lags and not hasattr(optimizer, "registered_weights"):
        raise UserError(
            "the saved optimizer state has rows of a table that was stepped lazily. Load "
            "finetune.optim.adapt_state(optimizer, state), after the weights saved with it"
        )
    if [len(group["params"]) for group in ours] != [len(group["params"]) for group in saved]:
        raise UserError(
            f"the saved optimizer state has parameter groups of {_sizes(saved)} parameters, but "
            f"this run has {_sizes(ours)}. Resume with the model, no_decay, overrides and "
            "layer_decay that it was saved with"
        )
    for group, theirs in zip(ours, saved):
        for here, there in zip(group.get("param_names", ()), theirs.get("param_names", ())):
            if here != there:
                raise UserError(
                    f"the saved optimizer state belongs to other parameters: it has {there!r} in "
                    f"the place of this run's {here!r}. Resume with the model and the parameter "
                    "groups that it was saved with"
                )
    named = [
        {**({"name": group["name"]} if "name" in group else {}), **theirs, KEY: name}
        for group, theirs in zip(ours, saved)
    ]
    return {**state_dict, "param_groups": named}


def _sizes(groups: list[dict[str, Any]]) -> str:
    return " + ".join(str(len(group["params"])) for group in groups)


def _same_rule(ours: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Return whether a bare torch group holds the same options.

    If one class has several rules, the options that choose among them must agree as well.
    """
    ours_only = {KEY, "name", "param_names", "initial_lr"}
    same_options = ours.keys() - ours_only == saved.keys() - ours_only
    return same_options and all(
        bool(ours.get(key)) == bool(saved.get(key))
        for key in ("momentum", "nesterov", "decoupled_weight_decay")
    )
