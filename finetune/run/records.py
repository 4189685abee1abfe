"""The records of a run: each file is a dataclass, which is written and read here only.

A key that this version does not know is kept when a file is read and written again. A key that is
missing, as in the file of an earlier run, has its default.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from finetune.errors import UserError
from finetune.run.checked import check_types
from finetune.run.files import read_json, read_json_lines, read_text, write_json, write_text
from finetune.run.folder import RunDir
from finetune.run.marker import MARKER, read_marker
from finetune.run.metrics import METRICS, number


@dataclass(frozen=True)
class JsonRecord:
    """A file of one JSON object whose keys are the fields. A field that is None is left out."""

    file: ClassVar[str]  # the property of RunDir that is its path
    indent: ClassVar[int | None] = 2

    more: Mapping[str, Any] = field(default_factory=dict, kw_only=True)  # keys not known here

    @classmethod
    def path(cls, run: RunDir) -> Path:
        """Return the file that holds this record of `run`."""
        path: Path = getattr(run, cls.file)
        return path

    @classmethod
    def read(cls, run: RunDir) -> Self:
        """Return the record of `run`, with every default if there is no such file.

        Raises UserError if the file is damaged.
        """
        path = cls.path(run)
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path} is not what a run writes ({error}). Restore or remove the file"
            ) from error

    def write(self, run: RunDir) -> None:
        """Put this record in the place of that of `run`. Raises UserError if the disk refuses."""
        write_json(self.path(run), self.as_dict(), indent=self.indent)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record whose file holds `values`."""
        known = {item.name for item in fields(cls)} - {"more"}
        found = {key: value for key, value in values.items() if key in known and value is not None}
        check_types(cls, found)
        return cls(**found, more={key: values[key] for key in values if key not in known})

    def as_dict(self) -> dict[str, Any]:
        """Return what the file holds."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values |= values.pop("more")
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Environment(JsonRecord):
    """environment.json: what a run was made with, and what its reader should know."""

    file = "environment"

    command: str = ""  # to be typed again
    started: str = ""  # ISO 8601
    begun_from: str | None = None  # the checkpoint of another run
    processes: int | None = None
    device: str = ""
    precision: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)  # name, shape, parameters counted
    training: Mapping[str, Any] = field(default_factory=dict)  # optimizer and method, in words
    settings: Mapping[str, Any] = field(default_factory=dict)  # that differ from the defaults
    peak_memory_gib: float | None = None  # of the main process, over all starts
    notes: Sequence[str] = ()  # choices made, things left out
    warned: Sequence[str] = ()  # those of the notes that warn


@dataclass(frozen=True)
class DataCounts(JsonRecord):
    """data.json: what was read and what became of it."""

    file = "data"

    format: str | None = None
    train: Mapping[str, int] | None = None  # what is counted -> how many
    languages: Sequence[str] | None = None  # source and target, of translation data
    validation: Mapping[str, int] | None = None
    system_prompt: str | None = None  # of all training conversations
    shared_beginnings: str | None = None  # what examples have in common, on one line


@dataclass(frozen=True)
class Vocabulary(JsonRecord):
    """vocabulary.json: the tokens that a run uses, written at its end."""

    file = "vocabulary"
    indent = None  # the ids are many

    chosen: str | None = None  # which rows train, on one line
    used: Sequence[int] = ()  # ids, ascending


@dataclass(frozen=True)
class StepRecord:
    """The line of metrics.jsonl for one step. A key that a file lacks is NaN or 0."""

    step: int
    epoch: float = math.nan
    loss: float = math.nan  # nats per target token
    lr: float = math.nan
    grad_norm: float = math.nan  # before clipping
    num_target_tokens: int = 0
    num_tokens: int = 0  # of the examples
    tokens_per_second: float = math.nan
    seconds: float = 0.0
    num_computed_tokens: int = 0  # of the examples' tokens; shared beginnings count once

    def number(self, key: str) -> float | None:
        """Return the number under `key`."""
        return getattr(self, key)

    def as_line(self) -> dict[str, Any]:
        """Return what the line holds."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """The figures after a step, by the keys of METRICS, with chrF's signature and seconds."""

    step: int
    metrics: Mapping[str, Any]

    def number(self, key: str) -> float | None:
        """Return the number under `key`, or None if it was not measured."""
        value = self.metrics.get(key)
        return None if value is None else float(value)

    def as_line(self) -> dict[str, Any]:
        """Return what the line of metrics.jsonl holds."""
        return {"step": self.step, "evaluation": self.metrics}


@dataclass(frozen=True)
class Evaluations(JsonRecord):
    """evaluation.json: the evaluations that a reader compares."""

    file = "evaluation"

    before: Evaluation | None = None
    after: Evaluation | None = None  # of the weights in model/, the best or the last ones
    best: Evaluation | None = None
    test: Mapping[str, Any] | None = None  # the figures on test data, measured after the run
    last_step: int | None = None  # at the run's end

    @property
    def end(self) -> int | None:
        """The step at which the run ended; None if it has not."""
        return self.after.step if self.last_step is None and self.after else self.last_step

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        parts = dict(values)
        for name in ("before", "after", "best"):
            if parts.get(name) is not None:
                metrics = dict(parts[name])
                parts[name] = _evaluation(metrics.pop("step"), metrics)
        return super().from_dict(parts)

    def as_dict(self) -> dict[str, Any]:
        return {
            name: {"step": part.step, **part.metrics} if isinstance(part, Evaluation) else part
            for name, part in super().as_dict().items()
        }


def has_ended(run: RunDir) -> bool:
    """Return whether a run came to its end. If evaluation.json is damaged, it did: it was there.

    Raises UserError for a damaged marker.
    """
    if not run.is_run():
        return False
    try:
        return Evaluations.read(run).end is not None
    except UserError:
        return True


@dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl: a held-out prompt, the answer in the data, and the model's."""

    step: int
    prompt: str
    reference: str
    output: str
    cut: bool = False  # the answer has all the tokens that it may have
    language: str | None = None  # of the reference, if it is known


def write_config(run: RunDir, text: str) -> None:
    """Write the resolved config, as YAML. Raises UserError if the disk refuses."""
    write_text(run.config, text)


def read_config(run: RunDir) -> str:
    """Return the resolved config, as YAML. Raises UserError if it cannot be read."""
    return read_text(run.config)


def read_metrics(run: RunDir) -> tuple[list[StepRecord | Evaluation], int]:
    """Return what was logged, in the order of the file, and how many lines were unreadable.

    There is nothing if the run has not begun. Raises UserError if the file cannot be read.
    """
    lines, unreadable = read_json_lines(run.metrics)
    records: list[StepRecord | Evaluation] = []
    for line in lines:
        try:
            records.append(_metrics_of(line))
        except (KeyError, TypeError, ValueError, OverflowError):
            unreadable += 1
    return records, unreadable


def _metrics_of(line: Mapping[str, Any]) -> StepRecord | Evaluation:
    if "evaluation" in line:
        return _evaluation(line["step"], dict(line["evaluation"]))
    known = {item.name for item in fields(StepRecord)}
    numbers: dict[str, Any] = {
        key: float(value) if isinstance(value, str) else value  # NaN and infinity are text
        for key, value in line.items()
        if key in known and value is not None
    }
    check_types(StepRecord, numbers)
    return StepRecord(**numbers)


def _evaluation(step: Any, metrics: dict[str, Any]) -> Evaluation:
    """Return an evaluation. Raises TypeError or ValueError for what is no number."""
    for metric in METRICS:
        number(metrics, metric.key)
    check_types(Evaluation, {"step": step})
    return Evaluation(step, metrics)


def evaluations_by_step(run: RunDir) -> dict[int, Evaluation]:
    """Return the evaluations that were logged, by step."""
    records, _ = read_metrics(run)
    return {record.step: record for record in records if isinstance(record, Evaluation)}


def read_samples(run: RunDir) -> tuple[list[Sample], int]:
    """Return the samples, in the order of the file, and how many lines were unreadable.

    Raises UserError if the file cannot be read.
    """
    lines, unreadable = read_json_lines(run.samples)
    samples: list[Sample] = []
    for line in lines:
        try:
            late = {"cut": bool(line.get("cut")), "language": line.get("language")}
            names = (item.name for item in fields(Sample) if item.name not in late)
            values = {name: line[name] for name in names} | late
            check_types(Sample, values)
        except (KeyError, TypeError):
            unreadable += 1
        else:
            samples.append(Sample(**values))
    return samples, unreadable


def trained_languages(run: RunDir | None) -> Sequence[str]:
    """Return the two languages that a run was trained on; none if that is not known."""
    return (DataCounts.read(run).languages or ()) if run is not None else ()


@dataclass
class RunRecords:
    """Everything that a run has written so far.

    All but the config may be missing if the run goes on, was stopped, or had no evaluation.
    """

    name: str
    config: str  # YAML, as in the file
    environment: Environment
    data: DataCounts
    steps: list[StepRecord]
    evaluations: list[Evaluation]  # in the order of steps
    samples: list[Sample]
    before: Evaluation | None  # before the first step
    after: Evaluation | None  # of the weights in model/; the last one of a run that goes on
    best: Evaluation | None
    test: Mapping[str, Any] | None  # on test data, after the run
    finished: bool
    diverged: bool
    notes: list[str]
    warned: list[str]  # those of the notes that warn


def read_run(root: Path) -> RunRecords:
    """Return the records of the run in `root`.

    Raises UserError if there is none, or if one of its files cannot be read.
    """
    run = RunDir(root)
    marker = read_marker(root) if root.is_dir() else None
    if marker is None or marker.kind != "run":
        what = "is a file" if root.exists() else "does not exist"
        what = f"holds no run (it has no {MARKER})" if root.is_dir() else what
        what = what if marker is None else f"holds a {marker.kind} and no run"
        raise UserError(
            f"{root} {what}. Name the folder that a training run has written, the output_dir of "
            "its config"
        )
    environment, summary = Environment.read(run), Evaluations.read(run)
    logged, lost_metrics = read_metrics(run)
    samples, lost_samples = read_samples(run)
    lost = [*_said_lost(run.metrics, lost_metrics), *_said_lost(run.samples, lost_samples)]
    evaluations = [record for record in logged if isinstance(record, Evaluation)]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
    steps = [record for record in logged if isinstance(record, StepRecord)]
    if steps and summary.end is not None and steps[-1].step < summary.end:
        summary = Evaluations()  # of steps that were taken back
    return RunRecords(
        name=root.resolve().name,
        config=read_config(run),
        environment=environment,
        data=DataCounts.read(run),
        steps=steps,
        evaluations=evaluations,
        samples=samples,
        before=summary.before or (first if first and first.step == 0 else None),
        after=summary.after or (last if last and last.step > 0 else None),
        best=summary.best,
        test=summary.test,
        finished=summary.end is not None and (not steps or steps[-1].step == summary.end),
        diverged=run.bad_batch.is_file(),
        notes=[*map(str, environment.notes), *lost],
        warned=[*map(str, environment.warned), *lost],
    )


def _said_lost(path: Path, lost: int) -> list[str]:
    if not lost:
        return []
    lines = "1 line" if lost == 1 else f"{lost} lines"
    return [f"{path.name}: {lines} could not be read and had to be left out."]
