"""The data of a comparison in files: for training, for choosing, and for the result.

A run of its own holds records out by its seed. Here the seeds differ, and every run must read the
same records.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from finetune.config.schema import DataSection, SourceSection
from finetune.data.sources import Records
from finetune.errors import UserError
from finetune.recipes.build.data import load_raw_data, open_records
from finetune.run.files import make_folder, read_text, write_text

HALVES = (
    "the held-out records are split in two: the 1st, 3rd, 5th … choose, "
    "the 2nd, 4th, 6th … are the test data"
)
OWN_TEST = "the held-out records choose, and data.test is the test data"


def hold_out(data: DataSection, *, seed: int, folder: Path, test: bool, again: bool) -> DataSection:
    """Return the data section for the runs of a comparison, and write their records to `folder`.

    With `test`, its data.test has no record of its data.validation. The training records are
    written only if others were split off from them. Files that exist are written again if that is
    asked for. Else they must hold the same. Raises UserError if they do not, and if nothing can be
    held out.
    """
    if data.streaming:
        raise UserError(
            "data.streaming is true, and a comparison reads the same records many times. "
            "Set data.streaming=false"
        )
    names = [
        "validation",
        *(["test"] if test else []),
        *(["train"] if data.validation is None else []),
    ]
    paths = {name: folder / f"{name}.jsonl" for name in names}
    raw = load_raw_data(data, seed=seed)
    if raw.validation is None:
        raise UserError(
            "a comparison needs held-out data. "
            "Set data.validation, or data.validation_fraction above 0"
        )
    assert isinstance(raw.train, Records)
    chosen, tested = _split(raw.validation, data) if test else (raw.validation, None)
    make_folder(folder)
    for name, records in (("validation", chosen), ("test", tested), ("train", raw.train)):
        if name in paths and records is not None:
            _write(paths[name], records, again=again)
    sources = {name: (SourceSection(path=str(path)),) for name, path in paths.items()}
    return data.model_copy(
        update={"validation_fraction": 0.0, "max_validation_records": None, **sources}
    )


def data_rule(data: DataSection) -> str:
    """Return in words which data chooses a learning rate, and which gives the result."""
    return HALVES if data.test is None else OWN_TEST


def _split(held_out: Records, data: DataSection) -> tuple[Records, Records]:
    """Return the records that choose, and those of the test data."""
    if data.test is not None:
        return held_out, open_records(data.test, data)
    if len(held_out) < 2:
        raise UserError(
            "one record is held out, and it cannot both choose and be the test data. "
            "Give data.test, or hold out more records"
        )
    return held_out.select(range(0, len(held_out), 2)), held_out.select(range(1, len(held_out), 2))


def _write(path: Path, records: Iterable[tuple[str, object]], *, again: bool) -> None:
    """Write the records to `path`, one JSON object a line, whole or not at all."""
    lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for _, record in records)
    text = "".join(lines)
    if again or not path.is_file():
        write_text(path, text)
    elif read_text(path) != text:
        raise UserError(
            f"the data is no longer that of {path}, with which the comparison was begun. Restore "
            "it, name another output_dir, or delete the folder"
        )
