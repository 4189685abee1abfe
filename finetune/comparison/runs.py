"""What a comparison knows of one run: its settings and outcome, and its curves, read from the run's folder.

Floor 1. Beside the files of every run (`finetune.run_dir`) such a folder holds `result.json`, written last, and `updates.jsonl`.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.run_dir import RunDir

Phase = Literal["tuning", "reported"]


@dataclass(frozen=True)
class Result:
    """The outcome of one run. `test` is None for a run that only served to choose a learning rate, or that diverged."""

    optimizer: str
    phase: Phase
    seed: int
    settings: dict[str, Any]  # every option that the optimizer was built with
    problem: str  # why the run diverged, "" where it did not
    start: dict[str, str]  # hashes of the weights and of the training data that it began with
    state_bytes: int = 0  # of the optimizer, after the last step
    test: dict[str, float] | None = (
        None  # nats per target token: "all", and by bin "head", "body", "tail"
    )
    bins: dict[str, dict[str, int]] | None = (
        None  # by bin: "tokens" of the vocabulary, "targets" in the test data
    )

    @property
    def lr(self) -> float:
        return float(self.settings["lr"])


@dataclass(frozen=True)
class Point:
    """A held-out loss, nats per target token, and what training had cost until then. Evaluations are off the clock."""

    step: int
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run that is over: its result and its curves."""

    folder: str
    result: Result
    points: list[Point]
    updates: list[tuple[int, float]] = field(
        default_factory=list
    )  # (step, norm of the update over norm of the weights)
    steps: int = 0  # taken

    @property
    def diverged(self) -> bool:
        return self.result.problem != "" or not math.isfinite(self.points[-1].loss)

    @property
    def loss(self) -> float:
        """The held-out loss after the last step; infinite where the run diverged."""
        return math.inf if self.diverged else self.points[-1].loss

    @property
    def test_loss(self) -> float:
        """The loss on the test data; infinite where the run diverged."""
        return math.inf if self.diverged or self.result.test is None else self.result.test["all"]

    def first_at(self, target: float) -> Point | None:
        """The first evaluation at or below `target`."""
        return next((point for point in self.points if point.loss <= target), None)


def result_path(folder: Path) -> Path:
    return folder / "result.json"


def updates_path(folder: Path) -> Path:
    return folder / "updates.jsonl"


def write_result(folder: Path, result: Result) -> None:
    """Mark the run in `folder` as over: whole or not there."""
    temporary = result_path(folder).with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")
    temporary.replace(result_path(folder))


def read_run(folder: Path) -> Run | None:
    """The run in `folder`, or None where it is not over."""
    if not result_path(folder).is_file():
        return None
    result = Result(**json.loads(result_path(folder).read_text(encoding="utf-8")))
    points, steps, tokens, seconds = [], 0, 0, 0.0
    for record in _lines(RunDir(folder).metrics):
        if "evaluation" in record:
            points.append(
                Point(record["step"], float(record["evaluation"]["loss"]), tokens, seconds)
            )
        else:
            steps, tokens, seconds = (
                record["step"],
                tokens + record["num_tokens"],
                seconds + record["seconds"],
            )
    updates = {
        record["step"]: float(record["ratio"]) for record in _lines(updates_path(folder))
    }  # a resumed step stands twice
    return Run(folder.name, result, points, sorted(updates.items()), steps)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # cut short when the process was killed; the step was taken again
    return records
