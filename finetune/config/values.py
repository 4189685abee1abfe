"""The kinds of values that keys of a config take: counts, shares, times and paths."""

import math
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

MOST = 1_000_000_000  # of any count
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
TokenCount = Annotated[int, Field(ge=1, le=1 << 24)]
Seconds = Annotated[int, Field(ge=1, le=10_000_000)]
SeedNumber = Annotated[int, Field(ge=0, lt=1 << 32)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
HIGHEST_RATE = 1000.0
Rate = Annotated[float, Field(gt=0, le=HIGHEST_RATE)]


def plausible_override(override: dict[str, Any]) -> dict[str, Any]:
    """Return one of optimizer.overrides. Raises ValueError for a value that none can have."""
    pattern = override.get("pattern", "*")
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(
            f"optimizer.overrides has the pattern {pattern!r}. Give text such as *.embed*"
        )
    for key, highest in (("lr", HIGHEST_RATE), ("weight_decay", math.inf)):
        value = override.get(key, 0)
        if isinstance(value, bool) or (
            isinstance(value, int | float) and highest < value < math.inf
        ):
            to = "up" if highest == math.inf else f"to {highest:g}"
            raise ValueError(f"optimizer.overrides has {key} {value!r}. Give a number from 0 {to}")
    return override


Override = Annotated[dict[str, Any], AfterValidator(plausible_override)]


LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of every common file system


def expand(path: str) -> str:
    """Return a path with ~ and an environment variable at its start written out.

    Raises ValueError if the variable is not set, or if no file can have that name.
    """
    if not path.strip():  # the current folder, for pathlib
        raise ValueError(f"the path {path!r} names nothing. Give a file, a folder or a hub name")
    if "\0" in path or any("\ud800" <= letter <= "\udbff" for letter in path):
        raise ValueError(f"the path {path!r} holds a character that no path can have")
    longest = max(path.split("/"), key=len)
    if len(os.fsencode(longest)) > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH:
        raise ValueError(
            f"a path of {len(path):,} characters is too long. A name has at most {LONGEST_NAME} "
            f"bytes, and a path {LONGEST_PATH:,}"
        )
    found = re.match(r"\$(?:(\w+)|\{(\w+)\})(?=/|$)", path)
    if found and (found[1] or found[2]) not in os.environ:
        raise ValueError(
            f"the path {path!r} begins with an environment variable that is not set. "
            "Set it, or write the path out"
        )
    return os.path.expanduser(os.path.expandvars(path) if found else path)


def seconds_of(value: Any) -> Any:
    """Return the seconds of a duration such as "15min", "2h", "1h 30min" or "90s".

    Anything but text is returned as it is. Raises ValueError.
    """
    if not isinstance(value, str):
        return value
    parts = re.findall(r"([0-9.]+)\s*(s|sec|min|m|h)(?![a-z])", value.lower())
    rest = re.sub(r"([0-9.]+)\s*(s|sec|min|m|h)(?![a-z])|\s", "", value.lower())
    try:
        if parts and not rest:
            return sum(float(number) * _UNITS[unit] for number, unit in parts)
        return float(value)
    except ValueError:
        raise ValueError(
            f"the time {value!r} is not one. Write e.g. 15min, 2h, 1h 30min, or seconds"
        ) from None


_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}
Duration = Annotated[
    float,
    BeforeValidator(seconds_of, json_schema_input_type=float | str),
    Field(gt=0, le=10_000_000),
]

PathText = Annotated[str, AfterValidator(expand)]
"""A path, or a name that may be one."""
