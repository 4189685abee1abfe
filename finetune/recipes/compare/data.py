"""The data of a comparison in files: what is trained on, what chooses, what is reported on, the same rows for every run.

Floor 5. A run of its own holds rows out by its seed; here the seeds differ and the rows may not.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from finetune.config.schema import DataSection, SourceSection
from finetune.data.sources import Records, load_records
from finetune.errors import UserError
from finetune.recipes.build.data import as_sources, load_raw_data

HALVES = "the held-out rows are split in two: the 1st, 3rd, 5th … choose, the 2nd, 4th, 6th … are the test data"
OWN_TEST = "the held-out rows choose, data.test is the test data"


def hold_out(data: DataSection, *, seed: int, folder: Path, test: bool) -> DataSection:
    """The data section for the runs of a comparison; with `test`, its data.test is rows that its data.validation has not.

    Records are written to `folder` unless they stand there already; the training records only where others were split off from them.
    Raises UserError where there is nothing to hold out.
    """
    if data.streaming:
        raise UserError(
            "data.streaming: a comparison reads the same rows many times over; set data.streaming=false"
        )
    names = [
        "validation",
        *(["test"] if test else []),
        *(["train"] if data.validation is None else []),
    ]
    paths = {name: folder / f"{name}.jsonl" for name in names}
    if not all(path.is_file() for path in paths.values()):
        raw = load_raw_data(data, seed=seed)
        if raw.validation is None:
            raise UserError(
                "a comparison needs held-out data: set data.validation or data.validation_fraction"
            )
        assert isinstance(raw.train, Records)
        chosen, tested = _parts(raw.validation, data) if test else (raw.validation, None)
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("validation", chosen), ("test", tested), ("train", raw.train)):
            if name in paths and rows is not None:
                _write(paths[name], rows)
    sources = {name: (SourceSection(path=str(path)),) for name, path in paths.items()}
    return data.model_copy(
        update={"validation_fraction": 0.0, "max_validation_records": None, **sources}
    )


def rule(data: DataSection) -> str:
    """What chooses and what is reported on, in words."""
    return HALVES if data.test is None else OWN_TEST


def _parts(held_out: Records, data: DataSection) -> tuple[Records, Records]:
    if data.test is not None:
        return held_out, load_records(as_sources(data.test)).take(data.max_validation_records)
    if len(held_out) < 2:
        raise UserError(
            "one held-out row cannot both choose and be reported on: give data.test, or hold out more"
        )
    return held_out.select(range(0, len(held_out), 2)), held_out.select(range(1, len(held_out), 2))


def _write(path: Path, rows: Iterable[tuple[str, object]]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for _, row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    temporary.replace(path)
