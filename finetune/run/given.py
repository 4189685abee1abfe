"""Records that a caller has in memory, kept as a file in the run's folder.

So the run's config names what it was trained on, and a resumed run or an evaluation reads it again.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.run.files import make_folder, write_text
from finetune.run.folder import RunDir


def _entries(record: Mapping[Any, Any], number: int) -> Iterator[str]:
    """Yield each column of a record as JSON. What a table has for an empty cell (NaN) is null."""
    for column, value in record.items():
        value = None if isinstance(value, float) and math.isnan(value) else value
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
    if isinstance(value, date | time):
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
            raise UserError(
                f"record {number} of the data is a {type(record).__name__}. Give mappings, such as "
                "{'prompt': …, 'completion': …}"
            )
        lines.append("{" + ", ".join(_entries(record, number)) + "}\n")
    if not lines:
        raise UserError("the data has no records. Give at least two")
    text = "".join(lines)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = run.root / f"{what}-{digest}.jsonl"
    if path.is_file():
        return path, False
    make_folder(path.parent)
    write_text(path, text)
    return path, True
