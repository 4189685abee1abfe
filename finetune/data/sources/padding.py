"""Records of Parquet files without the nulls that the file had to add.

Parquet gives every object of a column the same keys, so it cannot tell a null from a key that is
missing. In JSON a null is what the file says, and stays.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.types import Record


def without_padding(record: Record) -> Record:
    """Return a record whose objects have no keys with null; its columns stay."""
    return {column: _without_nulls(value) for column, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value
