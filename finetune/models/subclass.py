"""A module computed another way in place: its class becomes a subclass that is made on the fly, and can be copied and pickled.

Floor 2.
"""

import functools
from typing import Any

from torch import nn


def put_before(module: Any, first: type[nn.Module], **attributes: Any) -> None:
    """Let `module` look for methods in `first` before its own class; `attributes` (hashable) belong to the new class."""
    module.__class__ = derived_class(
        f"Fused{type(module).__name__}", (first, type(module)), **attributes
    )


@functools.cache
def derived_class(name: str, bases: tuple[type, ...], **attributes: Any) -> Any:
    """The subclass of `bases` (one of them an nn.Module) with `attributes` (hashable): one class for the same arguments."""
    made = type(name, bases, {**attributes, "__reduce_ex__": _reduce})
    made._made_of = (name, bases, attributes)  # type: ignore[attr-defined]
    return made


def _reduce(module: Any, protocol: Any) -> tuple:
    return _instance, module._made_of, module.__dict__


def _instance(name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> Any:
    made = derived_class(name, bases, **attributes)
    return made.__new__(made)
