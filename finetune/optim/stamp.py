"""The optimizer's name in its own state, and the options of its groups.

The name keeps a checkpoint from being loaded into another optimizer. torch matches states by
position alone: `Adam` takes the state of `AdamW` and becomes it, and `SGD` takes it and fails a
step later (seen in torch 2.13). The stamp is the plain group key "optimizer", which survives
state_dict, pickle, deepcopy, weights_only and wrappers. The check is a load hook of torch's, which
has two limits. torch leaves hooks behind when an optimizer object is itself copied or pickled, and
bitsandbytes (0.50) has a load_state_dict of its own, which calls none.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from finetune.errors import UserError
from finetune.optim.registry import (
    OptimizerInfo,
    list_optimizers,
    optimizer_info,
    options_in_source,
    small_optimizer,
)

KEY = "optimizer"

_BARE_ADAMW = "a bare torch.optim.AdamW"


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
    some optimizers count in their groups (schedule-free sums its weights). `go_on_with` gives the
    groups their own options back, and leaves the counts.
    """
    names = optimizer_info(optimizer.defaults[KEY]).options
    return [
        {name: group[name] for name in names if name in group} for group in optimizer.param_groups
    ]


def go_on_with(optimizer: torch.optim.Optimizer, own: Sequence[Mapping[str, Any]]) -> None:
    """Give the groups of an optimizer that has loaded a state their own options, of `options_of`.

    Raises UserError for an option that needs what the saved state does not have: amsgrad and its
    kind, where they were off.
    """
    for group, now in zip(optimizer.param_groups, own, strict=True):
        then = {**now, **{name: group[name] for name in now if name in group}}
        switched_on = [name for name in now if name != "lr" and now[name] and not then[name]]
        if switched_on:
            _check_switch(optimizer_info(optimizer.defaults[KEY]), then, now, switched_on)
        group.update(now)


def _check_switch(
    info: OptimizerInfo, then: Mapping[str, Any], now: Mapping[str, Any], options: Sequence[str]
) -> None:
    small = small_optimizer(info, then)
    small.step()
    small.param_groups[0].update(now)
    try:
        small.step()
    except KeyError as error:
        raise UserError(
            f"{' and '.join(options)} of the optimizer cannot be switched on in mid-run: the "
            f"checkpoint has no {error.args[0]}. Resume without it, or start a new run"
        ) from error


def _refuse_another(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return `state_dict` with the stamp in each group.

    Raises UserError if it is of another rule or of other parameters. A state without a stamp comes
    from a bare torch optimizer; it is taken if its groups show the same rule.
    """
    name = optimizer.defaults[KEY]
    ours, saved = optimizer.param_groups, state_dict["param_groups"]
    found = {
        group.get(KEY) or (name if _same_rule(optimizer, group) else _name_of_bare(group))
        for group in saved
    }
    lags = any("last_step" in entry for entry in state_dict["state"].values())
    if found != {name}:
        raise UserError(
            f"the saved optimizer state is of {', '.join(sorted(found - {name}))}, but this run "
            f"uses {name}. {_way_out(optimizer, found - {name})}"
        )
    if lags and not hasattr(optimizer, "registered_weights"):
        raise UserError(
            "the saved optimizer state has rows of a table that was stepped lazily. Load "
            "finetune.optim.adapt_state(optimizer, state), after the weights saved with it"
        )
    check_sizes(ours, saved)
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


def check_sizes(ours: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Raise UserError unless both have as many groups, with as many parameters each."""
    here, there = ([len(group["params"]) for group in groups] for groups in (ours, saved))
    if here != there:
        raise UserError(
            f"the saved optimizer state has parameter groups of {_sum(there)} parameters, but this "
            f"run has {_sum(here)}. Resume with the model, no_decay, overrides and layer_decay "
            "that it was saved with"
        )


def _sum(sizes: list[int]) -> str:
    return " + ".join(map(str, sizes))


def _same_rule(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> bool:
    """Return whether a bare torch group holds the same options.

    What else it holds does not matter: schedulers and users put keys of their own into groups. If
    one class has several rules, the options that choose among them must agree as well.
    """
    own = optimizer.defaults.keys() - {KEY}
    infos = [optimizer_info(name) for name in list_optimizers()]
    known = {option for info in infos for option in (*options_in_source(info), *info.fixed)}
    if not own <= saved.keys() or (known - own) & saved.keys():
        return False
    ours = optimizer.param_groups[0]
    return all(
        bool(ours.get(key)) == bool(saved.get(key))
        for key in ("momentum", "nesterov", "decoupled_weight_decay")
    )


def _name_of_bare(saved: Mapping[str, object]) -> str:
    """Return what to call the optimizer of a group without a stamp."""
    is_adamw = "amsgrad" in saved and saved.get("decoupled_weight_decay")
    return _BARE_ADAMW if is_adamw else "another optimizer"


def _way_out(optimizer: torch.optim.Optimizer, others: set[str]) -> str:
    """Return what to do with a state that is of `others`."""
    if hasattr(optimizer, "registered_weights") and others <= {"adamw", _BARE_ADAMW}:
        return "Load it by finetune.optim.from_adamw_state(optimizer, state)"
    if {rule_of(other) for other in others} == {rule_of(optimizer.defaults[KEY])}:
        return "Load finetune.optim.adapt_state(optimizer, state), after the weights saved with it"
    return "Resume with the same optimizer, or start again from the weights alone"
