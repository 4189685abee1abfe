"""The check that a checkpoint's files have the form of what a run writes.

Their hashes say that they are as they were written. They do not say who wrote them.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_LEVELS = 50
_MOST_VALUES = 10_000_000
_LARGEST = 1 << 53  # of an integer


def check_tree(tree: object) -> None:
    """Raise TypeError unless `tree` is of mappings, lists, tensors and plain values, not deep."""
    pending: list[tuple[object, int]] = [(tree, 0)]
    count = 0
    while pending:
        item, depth = pending.pop()
        count += 1
        if depth > _MOST_LEVELS or count > _MOST_VALUES:
            raise TypeError("it is nested too deeply, or holds too many values")
        if isinstance(item, Mapping):
            pending += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, list | tuple):
            pending += [(part, depth + 1) for part in item]
        elif not isinstance(item, Tensor | str | int | float | None):
            raise TypeError(f"it holds a {type(item).__name__}")


def check_like(found: object, ours: object, where: str) -> None:
    """Raise TypeError unless `found` has the keys and the types of `ours`.

    Lists may be of any length. What is None in one of the two is not compared.
    """
    if ours is None or found is None:
        return
    if isinstance(ours, Mapping):
        if not isinstance(found, Mapping) or found.keys() != ours.keys():
            raise TypeError(f"{where} has other keys than {', '.join(map(str, ours))}")
        for key, value in ours.items():
            check_like(found[key], value, f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        if not isinstance(found, list | tuple):
            raise TypeError(f"{where} is no list")
        for item in found if ours else ():
            check_like(item, ours[0], where)
    elif isinstance(ours, bool | str | Tensor):
        if not isinstance(found, type(ours)):
            raise TypeError(f"{where} is not a {type(ours).__name__}")
    elif isinstance(ours, int | float):
        whole = int if isinstance(ours, int) else (int, float)
        if isinstance(found, bool) or not isinstance(found, whole):
            raise TypeError(f"{where} is not a number of its kind")
        if isinstance(found, int) and not 0 <= found < _LARGEST:
            raise TypeError(f"{where} is {found}")


def in_order(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of an optimizer so that equal states become equal bytes.

    The parameters are in their order, also after a state was loaded. Equal texts are one object,
    which a pickle writes once.
    """
    return {
        **state_dict,
        "state": _with_shared_texts(dict(sorted(state_dict["state"].items()))),
        "param_groups": _with_shared_texts(state_dict["param_groups"]),
    }


def _with_shared_texts(tree: Any) -> Any:
    if isinstance(tree, str):
        return sys.intern(str(tree))
    if type(tree) is dict:
        return {_with_shared_texts(key): _with_shared_texts(tree[key]) for key in tree}
    return [_with_shared_texts(item) for item in tree] if type(tree) is list else tree


def has_shaped_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a parameter's state has its shape, as is known of torch's classes and ours."""
    return type(optimizer).__module__.split(".")[0] in ("torch", "finetune")


def check_optimizer_state(
    found: object, ours: Mapping[str, Any], parameters: Sequence[Tensor], *, shaped: bool = True
) -> None:
    """Raise TypeError unless `found` can be the state of the optimizer whose state is `ours`.

    If `shaped`, a parameter's state has the parameter's shape, or 1 in the place of a size, or no
    shape. Else it has a form of its own: a factor of each side (Shampoo), tables of quantised
    values. That of a lazy table has one too, which the optimizer checks.
    """
    if not isinstance(found, Mapping) or found.keys() != ours.keys():
        raise TypeError(f"it has other keys than {', '.join(ours)}")
    groups, state = found["param_groups"], found["state"]
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise TypeError("param_groups is not a list of mappings")
    members = [group.get("params") for group in groups]
    if not all(isinstance(numbers, list) and _are_whole(numbers) for numbers in members):
        raise TypeError("param_groups has members that are not numbers of parameters")
    if not isinstance(state, Mapping):
        raise TypeError("state is not a mapping")
    if list(map(len, members)) != [len(group["params"]) for group in ours["param_groups"]]:
        return  # of other settings, as the optimizer says
    for index, values in state.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise TypeError(f"it has a state for the parameter {index!r}, which the model lacks")
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise TypeError(f"the state of parameter {index} is not a mapping")
        if "last_step" in values:  # of a lazy table
            continue
        for name, value in values.items():
            what = f"{name} of parameter {index}"
            if shaped:
                _check_shape(what, value, parameters[index])
            _check_finite(what, value)


def _are_whole(numbers: Sequence[Any]) -> bool:
    return all(type(number) is int for number in numbers)


def _check_shape(what: str, value: object, parameter: Tensor) -> None:
    if isinstance(value, Tensor):
        sizes = zip(value.shape, parameter.shape)
        fits = value.ndim == parameter.ndim and all(a in (1, b) for a, b in sizes)
        if value.numel() > 1 and not fits:
            raise TypeError(f"{what} has the shape {tuple(value.shape)}")
    elif not isinstance(value, int | float | None):
        raise TypeError(f"{what} is not a tensor or a number")


def _check_finite(what: str, value: object) -> None:
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            _check_finite(what, part)
    elif isinstance(value, Tensor) and value.is_floating_point():
        wide = value.float() if value.itemsize == 1 else value  # float8 does not know isfinite
        if not torch.isfinite(wide).all():
            raise TypeError(f"{what} holds NaN or infinity")
