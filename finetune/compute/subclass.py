"""Subclasses made on the fly, for a module that is to be computed another way in place.

Such a module keeps its identity, its parameters and their names. It can be copied and pickled.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn


def put_before(module: Any, first: type[nn.Module], **attributes: Any) -> None:
    """Let `module` look for methods in `first` before it looks in its own class.

    `attributes` become attributes of the new class; their values must be hashable.
    """
    module.__class__ = derived_class(
        f"Fused{type(module).__name__}", (first, type(module)), **attributes
    )


def likeness_of(module: nn.Module) -> Hashable:
    """Return what decides how a module computes: equal for two that differ in their numbers alone.

    The class does not: Gemma 4 has norms of one class with and without a weight, and Gemma 3n has
    MLPs of one class of which some are sparse. Values that are not understood tell modules apart.
    """
    return type(module), tuple((name, _kind(value)) for name, value in vars(module).items())


def _kind(value: Any) -> Hashable:
    if isinstance(value, nn.Module):
        return likeness_of(value)
    if isinstance(value, dict):
        return tuple((key, _kind(item)) for key, item in value.items())
    if isinstance(value, nn.Parameter):
        return value.shape
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, Tensor) or value:
        return id(value)
    kind: type = type(value)
    return kind


def in_both_modes(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a module gives in evaluation and in training, where it may have dropout."""
    with torch.random.fork_rng(devices=[]):  # dropout draws numbers
        return module.eval()(x), module.train()(x)


@functools.cache
def derived_class(name: str, bases: tuple[type, ...], **attributes: Any) -> Any:
    """Return the subclass of `bases`, one of them an nn.Module, that has `attributes`.

    The same arguments give the same class. The values of `attributes` must be hashable.
    """
    made = type(name, bases, {"__reduce_ex__": _reduce, **attributes})
    made._made_of = (name, bases, attributes)  # type: ignore[attr-defined]
    return made


def _reduce(module: Any, protocol: Any) -> tuple:
    """Name a module's class by what it was made of: no import finds a class made on the fly."""
    return _instance, module._made_of, module.__dict__


def _instance(name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> Any:
    made = derived_class(name, bases, **attributes)
    return made.__new__(made)
