"""The files that grow during a run: metrics.jsonl with its listeners, and samples.jsonl."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from finetune.run.files import append_lines, make_folder, raw_lines, sync_file, write_text
from finetune.run.folder import RunDir
from finetune.run.records import Evaluation, Sample, StepRecord

Listener = Callable[[StepRecord | Evaluation], None]


class MetricLogger:
    """A file that gets one line for each record, and listeners (progress display, trackers)."""

    def __init__(self, path: Path, *, listeners: tuple[Listener, ...] = ()) -> None:
        self._path = path
        self._listeners = listeners
        make_folder(path.parent)

    def log(self, record: StepRecord | Evaluation) -> None:
        """Append `record` and pass it to the listeners. Raises UserError if the disk refuses."""
        append_lines(self._path, [record.as_line()])
        for listener in self._listeners:
            listener(record)

    def sync(self) -> None:
        """Wait until the disk has all lines. Raises UserError if it refuses."""
        for path in (self._path, RunDir(self._path.parent).samples):
            sync_file(path)


def keep_samples(run: RunDir, samples: Sequence[Sample]) -> None:
    """Append `samples` to samples.jsonl. Raises UserError if the disk refuses."""
    append_lines(run.samples, map(asdict, samples))


def forget_after(run: RunDir, step: int) -> None:
    """Remove what was logged after `step`, and lines that are cut short.

    A resumed run takes these steps again. Raises UserError if the disk refuses.
    """
    for path in (run.metrics, run.samples, run.updates):
        if path.is_file():
            kept = [line.decode() for line in raw_lines(path) if _is_up_to(step, line)]
            write_text(path, "".join(line + "\n" for line in kept))


def _is_up_to(step: int, line: bytes) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (KeyError, TypeError, ValueError):
        return False


def tracker_values(record: StepRecord | Evaluation) -> dict[str, float]:
    """Return `record` as flat numbers for a tracker: "train/loss" or "evaluation/loss"."""
    if isinstance(record, Evaluation):
        part, values = "evaluation", dict(record.metrics)
    else:
        part, values = "train", record.as_line()
    return {
        f"{part}/{key}": value
        for key, value in values.items()
        if isinstance(value, int | float) and key != "step"
    }
