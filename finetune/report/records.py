"""Reading the files of a run's folder, whatever of them is there.

Floor 1.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.run_dir import RunDir

Record = dict[str, Any]


@dataclass
class RunRecords:
    """What a run has written so far. All but the config may be missing: the run goes on, was broken off, or had no evaluation."""

    name: str
    config: str  # YAML as it stands in the file
    environment: Record
    data: Record
    steps: list[Record]  # one a training step
    evaluations: list[Record]  # {"step": n, metric: value, ...}, in the order of steps
    samples: list[Record]
    before: Record | None  # the evaluation before the first step
    after: Record | None  # the last evaluation
    best: Record | None
    test: Record | None  # of an evaluation on test data after the run
    finished: bool
    diverged: bool
    notes: list[str] = field(default_factory=list)


def read_run(root: Path) -> RunRecords:
    """Read the run that lies in `root`. Raises UserError where there is none, or its files cannot be read."""
    run = RunDir(root)
    if not run.is_run():
        what = "holds no run (it has no config.yaml)" if root.is_dir() else "does not exist"
        raise UserError(
            f"{root} {what}: name the folder that a training run has written, the output_dir of its config"
        )
    environment = _read_json(run.environment)
    notes = [str(note) for note in environment.pop("notes", [])]
    lines = _read_lines(run.metrics, notes)
    evaluations = [
        {"step": line["step"], **line["evaluation"]} for line in lines if "evaluation" in line
    ]
    summary = _read_json(run.evaluation)
    first, last = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
    return RunRecords(
        name=root.resolve().name,
        config=_read_text(run.config),
        environment=environment,
        data=_read_json(run.data),
        steps=[line for line in lines if "loss" in line],
        evaluations=evaluations,
        samples=_read_lines(run.samples, notes),
        before=summary.get("before") or (first if first and first["step"] == 0 else None),
        after=summary.get("after") or (last if last and last["step"] > 0 else None),
        best=summary.get("best"),
        test=summary.get("test"),
        finished=run.evaluation.is_file()
        and summary.keys() != {"test"},  # the run itself writes more, or nothing, at its end
        diverged=run.bad_batch.is_file(),
        notes=notes,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> Record:
    """Return the object in `path`, an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(_read_text(path)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is no valid JSON object ({error}): restore it, or remove it to do without"
        ) from error


def _read_lines(path: Path, notes: list[str]) -> list[Record]:
    """Return the objects in `path`, one a line. Lines that a broken-off run has left incomplete are counted in `notes`."""
    records, unreadable = [], 0
    for line in _read_text(path).splitlines() if path.is_file() else []:
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            unreadable += 1
    if unreadable:
        notes.append(
            f"{path.name}: {unreadable} line{'s' if unreadable > 1 else ''} could not be read and had to be left out."
        )
    return records
