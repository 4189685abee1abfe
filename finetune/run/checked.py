"""The check that what was read from a JSON file has the types of the record's fields.

A file may have been changed by anyone. What passes here raises nothing where it is used.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

_LARGEST = 1 << 63  # of an integer


def check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Raise TypeError if one of `values` has another type than the field of `kind` of that name."""
    hints = _hints(kind)
    for key, value in values.items():
        if not _fits(value, hints[key]):
            shown = repr(value)
            raise TypeError(f"{key} is {shown if len(shown) < 60 else shown[:60] + '…'}")


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value from JSON has the type that an annotation names."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Any:
        return True
    if kind is typing.Union or kind is types.UnionType:
        return any(_fits(value, each) for each in inner)
    if kind is typing.Literal:
        return value in inner
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            return False
        return isinstance(value, float) or abs(value) < _LARGEST
    if kind in (Mapping, dict):
        items = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in items)
    if kind is Sequence:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    return isinstance(value, kind)
