"""A first record of local files, read before anything large is imported."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.bad_records import BadRecords
from finetune.data.sources.files import kind_of
from finetune.data.sources.local import FileStream, reader_of
from finetune.data.types import Record
from finetune.errors import UserError


def first_record(files: Sequence[Path]) -> Record | None:
    """Return the first record of the first file, or None if there is none.

    Bad lines are passed over. Raises UserError for a file that cannot be read.
    """
    return next(iter(first_records(files, 1)), None)


def first_records(files: Sequence[Path], count: int | None) -> list[Record]:
    """Return the first `count` records of the files, or all of them for None; see `first_record`.

    They are held in memory.
    """
    found: list[Record] = []
    for file in files:
        left = None if count is None else count - len(found)
        if kind_of(file) == "parquet":
            try:
                with pq.ParquetFile(file) as table:
                    for batch in table.iter_batches(batch_size=left or 1000):
                        found += batch.to_pylist()
                        if count is not None and len(found) >= count:
                            break
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{file} cannot be read as Parquet: {error}") from error
        else:
            stream = FileStream([file], reader_of, left).read(None, BadRecords("drop"))
            found += [record for _, _, record in stream]
        if count is not None and len(found) >= count:
            return found[:count]
    return found
