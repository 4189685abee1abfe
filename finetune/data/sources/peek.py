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
    """Return the first record of the files, or None if there is none.

    Bad lines are passed over. Raises UserError for a file that cannot be read.
    """
    for file in files:
        if kind_of(file) == "parquet":
            try:
                with pq.ParquetFile(file) as table:
                    for batch in table.iter_batches(batch_size=1):
                        return dict(batch.to_pylist()[0])
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{file} cannot be read as Parquet: {error}") from error
        else:
            for _, _, record in FileStream([file], reader_of, 1).read(None, BadRecords("drop")):
                return record
    return None
