"""Reading a column of a row by the name the format gives it.

Floor 1. `columns` maps what a format calls a column to what the data calls it, e.g. {"prompt": "question"}.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.types import Row
from finetune.errors import UserError, did_you_mean


def column(row: Row, name: str, columns: Mapping[str, str]) -> Any:
    """The value of the column. Raises UserError if it is missing, with the columns there are."""
    given = columns.get(name, name)
    if given not in row:
        raise UserError(
            f"column {given!r} is missing; the columns are {', '.join(row) or 'none'}{did_you_mean(given, row)}"
        )
    return row[given]


def text_column(row: Row, name: str, columns: Mapping[str, str]) -> str:
    """The value of a column of text; a missing value (null) reads as empty."""
    value = column(row, name, columns)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"column {columns.get(name, name)!r} must hold text, not {value!r:.80}")
    return value
