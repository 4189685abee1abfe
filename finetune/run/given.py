"""Records that a caller has in memory, kept as a file in the run's folder.

So the run's config names what it was trained on, and a resumed run or an evaluation reads it again.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from os import PathLike
from pathlib import Path
from typing import Any

from finetune.data.types import without_padding
from finetune.errors import UserError
from finetune.run.files import make_folder, read_text, write_text
from finetune.run.folder import RunDir

_NAME = re.compile(r"(train|validation|test)-[0-9a-f]{8}\.jsonl")
"""The name of a file that `keep_given` writes."""

_AS_PATHS = {
    "train": "data={'train': […]}",
    "validation": "data={'validation': […]}",
    "test": "one path, and not a list",
}


def records_of(data: Any) -> Iterable[Any]:
    """Return the records in what a caller gives as data: a list, a Dataset or a DataFrame.

    Raises UserError for anything else.
    """
    if has_splits(data):
        first = next(iter(data))
        raise UserError(f"the data has splits ({', '.join(data)}). Give one, as in data[{first!r}]")
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(data, pandas.DataFrame):
        if not data.columns.is_unique:
            twice = data.columns[data.columns.duplicated()][0]
            raise UserError(f"the data has more than one column {twice!r}. Rename or remove one")
        values = data.astype(object)
        found: list[Any] = values.where(values.notna(), None).to_dict("records")
        return found
    is_other = type(data).__module__.partition(".")[0] == "pandas"
    is_other = is_other or isinstance(data, Mapping | bytes | bytearray)
    if is_other or not isinstance(data, Iterable) or not hasattr(data, "__len__"):
        raise UserError(
            f"the data is a {type(data).__name__}. Give a path, a list of dicts, a "
            "pandas.DataFrame, or a datasets.Dataset"
        )
    if _is_of_datasets(data):
        return (without_padding(row) if isinstance(row, Mapping) else row for row in data)
    return data


def has_splits(data: Any) -> bool:
    """Return whether `datasets` made this of several datasets (DatasetDict)."""
    return isinstance(data, Mapping) and _is_of_datasets(data)


def _is_of_datasets(data: Any) -> bool:
    return type(data).__module__.partition(".")[0] == "datasets"


def own_copy(run: RunDir, path: str) -> Path | None:
    """Return the file in the run's folder that `path` named when the run had another place.

    It is None for a file of the user's own. The name has a hash of the records.
    """
    name = Path(path).name
    own = run.root / name
    return own if _NAME.fullmatch(name) and own.is_file() else None


def not_taken(run: RunDir, files: Sequence[Path]) -> list[Path]:
    """Return those of `files` that the run's config does not name; a damaged one may name any."""
    try:
        config = read_text(run.config) if run.config.is_file() else ""
    except UserError:
        return []
    return [file for file in files if file.name not in config]


def _entries(record: Mapping[Any, Any], number: int) -> Iterator[str]:
    """Yield each column of a record as JSON. An empty cell of a table (NaN or NaT) is null."""
    if len({str(column) for column in record}) < len(record):
        raise UserError(
            f"record {number} has two columns with one name in JSON, such as 1 and '1'. Rename one"
        )
    for column, value in record.items():
        value = None if isinstance(value, float | date) and value != value else value
        try:
            entry = json.dumps({column: value}, ensure_ascii=False, allow_nan=False, default=_date)
            entry.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"column {column!r} of record {number} has half of a surrogate pair, "
                f"{error.object[error.start]!a}, which is no character. Repair it, or leave it out"
            ) from error
        except (TypeError, ValueError) as error:
            raise UserError(
                f"column {column!r} of record {number} cannot be kept as JSON: {error}. Convert it "
                "to text, numbers, lists and mappings, or leave it out"
            ) from error
        yield entry[1:-1]


def _date(value: Any) -> str:
    """Return a date or a time as text. Raises TypeError for anything else."""
    if isinstance(value, date | time) and value == value:  # and not the NaT of pandas
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} is none of its values")


def keep_given(run: RunDir, records: Iterable[Any], what: str) -> tuple[Path, bool]:
    """Return the file that holds `records`, and whether it was written now.

    Its name has a hash of the content, so another call never replaces it. Raises UserError for a
    record that is no mapping, or that JSON cannot hold as it is.
    """
    lines = []
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            is_path = isinstance(record, str | PathLike)
            paths = f"; if it is a path, give {_AS_PATHS[what]}" if is_path else ""
            raise UserError(
                f"record {number} of the data is a {type(record).__name__}. Give mappings, such as "
                f"{{'prompt': …, 'completion': …}}{paths}"
            )
        lines.append("{" + ", ".join(_entries(record, number)) + "}\n")
    if not lines:
        least = "two" if what == "train" else "one"
        raise UserError(f"the data has no records. Give at least {least}")
    text = "".join(lines)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = run.root / f"{what}-{digest}.jsonl"
    if path.is_file():
        return path, False
    make_folder(path.parent)
    write_text(path, text)
    return path, True
