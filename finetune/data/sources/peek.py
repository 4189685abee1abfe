"""What the first lines and records of local files are, read before anything large is imported."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.bad_records import BadRecords
from finetune.data.formats.detect import find_shape
from finetune.data.sources.files import kind_of, read_lines
from finetune.data.sources.json_files import looks_like_json
from finetune.data.sources.local import FileStream, reader_of
from finetune.data.types import Record, without_padding
from finetune.errors import UserError

MOST_LOOKED_AT = 100  # records
_LOOKED_AT = 5  # lines
_TABLES = (("\t", "tabs", ".tsv"), (",", "commas", ".csv"), (";", "semicolons", ".csv"))


def first_records(files: Sequence[Path]) -> Iterator[Record]:
    """Yield the first records of the files, at most MOST_LOOKED_AT. Bad lines are passed over.

    Raises UserError for a file that cannot be read.
    """
    left = MOST_LOOKED_AT
    for file in files:
        records = _rows(file) if kind_of(file) == "parquet" else _records(file)
        for record in islice(records, left):
            left -= 1
            yield record


def _records(file: Path) -> Iterator[Record]:
    stream = FileStream([file], reader_of, MOST_LOOKED_AT)
    return (record for _, _, record in stream.read(None, BadRecords("drop")))


def _rows(file: Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file."""
    try:
        with pq.ParquetFile(file) as table:
            if table.metadata.num_rows == 0:
                raise UserError(f"{file} is empty: it has no rows")
            for batch in table.iter_batches(batch_size=1):
                yield without_padding(batch.to_pylist()[0])
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from error


def require_plain_text(files: Sequence[Path]) -> None:
    """Raise UserError for a text file whose first lines are JSON, or the rows of a table."""
    for file in files:
        if kind_of(file) != "text":
            continue
        lines = list(islice((line for line in read_lines(file) if line.strip()), _LOOKED_AT))
        for what, ending in _kinds_of(lines):
            raise UserError(
                f"{file} holds {what}, and its name says plain text. Name it {ending}, or set "
                "data.format=text to learn its lines as they are"
            )


def _kinds_of(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what the lines of a file are and the ending of its name, unless they are text."""
    first = lines[0].strip() if lines else ""
    if looks_like_json(first):
        yield "JSON", ".json" if first.startswith("[") or first == "{" else ".jsonl"
    for separator, name, ending in _TABLES:
        rows = [line.split(separator) for line in lines]
        width = len(rows[0]) if len(rows) > 1 else 0
        is_table = width > 1 and all(len(row) == width and all(map(str.strip, row)) for row in rows)
        if is_table and (separator == "\t" or _is_header(rows[0])):
            yield f"fields separated by {name}", ending


def _is_header(names: Sequence[str]) -> bool:
    """Return whether a format fits columns of these names."""
    record = dict.fromkeys(name.strip(' "') for name in names)
    try:
        kind, _, _ = find_shape("auto", record, columns={}, languages=(None, None))
    except UserError:
        return record.keys() >= {"source", "target"}  # only their languages are missing
    return kind != "text"
