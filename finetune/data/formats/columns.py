"""Columns of a record, read by the name that the format gives them.

`columns` maps what a format calls a column to what the data calls it, e.g. {"prompt": "question"}.
"""

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

from finetune.data.types import Record
from finetune.errors import UserError, did_you_mean


def column(record: Record, name: str, columns: Mapping[str, str]) -> Any:
    """Return the value of the column. Raises UserError if it is missing."""
    given = columns.get(name, name)
    if given not in record:
        raise UserError(
            f"column {given!r} is missing; the columns are {', '.join(record) or 'none'}"
            f"{did_you_mean(given, record)}"
        )
    return record[given]


def text_column(record: Record, name: str, columns: Mapping[str, str]) -> str:
    """Return the value of a column of text; a missing value (null) reads as empty."""
    value = column(record, name, columns)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"column {columns.get(name, name)!r} must hold text, not {value!r:.80}")
    return value


def unused_columns(record: Record, used: Container[str]) -> set[str]:
    """Return what is not used of a record: the columns that have a value and are not in `used`."""
    return {
        f"the column {name!r}"
        for name, value in record.items()
        if name not in used and value not in (None, "", [], {})
    }


def unused_notes(counts: Counter[str]) -> list[str]:
    """Return a sentence for each thing that is not used, with the records that have it."""
    return [
        f"not used: {what} ({count:,} record{'s' * (count != 1)})"
        for what, count in sorted(counts.items())
    ]
