"""A module computed another way in place: its class becomes a subclass that is made on the fly, and can be copied and pickled.

Floor 2.
"""

import functools
from typing import Any

from torch import nn


def put_before(module: Any, first: type[nn.Module], **attributes: Any) -> None:
    """Let `module` look for methods in `first` before its own class; `attributes` (hashable) belong to the new class."""
    module.__class__ = _subclass(first, type(module), tuple(attributes.items()))  # type: ignore[arg-type]


@functools.cache
def _subclass(first: type, cls: type, attributes: tuple[tuple[str, Any], ...]) -> Any:
    made = type(f"Fused{cls.__name__}", (first, cls), {**dict(attributes), "__reduce_ex__": _reduce})
    made._made_of = (first, cls, attributes)  # type: ignore[attr-defined]
    return made


def _reduce(module: Any, protocol: Any) -> tuple:
    return _instance, module._made_of, module.__dict__


def _instance(first: type, cls: type, attributes: tuple[tuple[str, Any], ...]) -> Any:
    made = _subclass(first, cls, attributes)
    return made.__new__(made)
