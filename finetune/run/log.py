"""The files that grow during a run: metrics.jsonl with its listeners, samples.jsonl, train.log."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TextIO

from finetune.errors import UserError
from finetune.run.files import (
    append_lines,
    make_folder,
    raw_lines,
    remove_file,
    sync_file,
    write_text,
)
from finetune.run.folder import RunDir
from finetune.run.records import Evaluation, Evaluations, Sample, StepRecord

Listener = Callable[[StepRecord | Evaluation], None]

VERBOSITY = "_FINETUNE_VERBOSITY"
"""The variable with which the command line says "quiet" or "verbose", also to its processes."""


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


class Journal:
    """What a command says, with the time. It is kept until a run's folder is open for it."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._file: TextIO | None = None

    def add(self, text: str) -> None:
        """Take in one line. A disk that refuses it is not worth the end of a run."""
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n"
        if self._file is None:
            self._lines.append(line)
            return
        with contextlib.suppress(OSError):
            self._file.write(line)
            self._file.flush()

    @contextlib.contextmanager
    def kept_in(self, run: RunDir) -> Iterator[None]:
        """Append to train.log what was said, what is said meanwhile, and the error, if any."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                log = run.log.open("a", encoding="utf-8", errors="backslashreplace")
                self._file = stack.enter_context(log)
                self._file.writelines(self._lines)
                self._lines.clear()
            try:
                yield
            except BaseException as error:
                self.add(f"ended by {type(error).__name__}: {error}")
                raise
            finally:
                self._file = None


def keep_samples(run: RunDir, samples: Sequence[Sample]) -> None:
    """Append `samples` to samples.jsonl. Raises UserError if the disk refuses."""
    append_lines(run.samples, map(asdict, samples))


def forget_after(run: RunDir, step: int, *, evaluated: bool = True) -> None:
    """Remove what was logged after `step`, lines that are cut short, and the batch of a divergence.

    A resumed run takes these steps again. If it was not `evaluated` at `step`, the lines of a begun
    evaluation there go too. So does the summary of a later end: it would be taken for that of the
    end to come. Raises UserError if the disk refuses.
    """
    remove_file(run.bad_batch)
    if _ended_after(run, step):
        remove_file(run.evaluation)
    for path in (run.metrics, run.samples, run.updates):
        if path.is_file():
            kept = [line.decode() for line in raw_lines(path) if _is_up_to(step, line, evaluated)]
            write_text(path, "".join(line + "\n" for line in kept))


def _ended_after(run: RunDir, step: int) -> bool:
    try:
        end = Evaluations.read(run).end
    except UserError:  # damaged; the next end makes it again
        return False
    return end is not None and end > step


def _is_up_to(step: int, line: bytes, evaluated: bool) -> bool:
    try:
        values = json.loads(line)
        last = step if evaluated or not {"evaluation", "prompt"} & values.keys() else step - 1
        return bool(values["step"] <= last)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
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
