"""Subclasses made on the fly, for a module that is to be computed another way in place.

Such a module keeps its identity, its parameters and their names. It can be copied and pickled.
"""

import functools
from typing import Any

from torch import nn


def put_before(module: Any, first: type[nn.Module], **attributes: Any) -> None:
    """Let `module` look for methods in `first` before it looks in its own class.

    `attributes` become attributes of the new class; their values must be hashable.
    """
    module.__class__ = derived_class(
        f"Fused{type(module).__name__}", (first, type(module)), **attributes
    )


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
