"""What a comparison knows of one run: its settings, its outcome and its curves.

They are read from the run's folder. In addition to the files of every run (`finetune.run_dir`), the
folder holds `updates.jsonl` and `result.json`, which is written last.
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
    """The outcome of one run. `test` is None for a tuning run, and for a run that diverged."""

    optimizer: str
    phase: Phase
    seed: int
    settings: dict[str, Any]  # all options that the optimizer was built with
    problem: str  # why the run diverged; "" if it did not
    start: dict[str, str]  # hashes of the weights and of the training data that it began with
    state_bytes: int = 0  # of the optimizer, after the last step
    test: dict[str, float] | None = None  # nats per target token: "all", "head", "body", "tail"
    bins: dict[str, dict[str, int]] | None = None  # "tokens" of the vocabulary, test "targets"

    @property
    def lr(self) -> float:
        return float(self.settings["lr"])


@dataclass(frozen=True)
class Point:
    """A held-out loss, in nats per target token, and what training had cost until then.

    The cost does not include evaluations.
    """

    step: int
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """A finished run: its result and its curves."""

    folder: str
    result: Result
    points: list[Point]
    # (step, norm of the update divided by the norm of the weights)
    updates: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0  # taken

    @property
    def diverged(self) -> bool:
        return self.result.problem != "" or not math.isfinite(self.points[-1].loss)

    @property
    def loss(self) -> float:
        """The held-out loss after the last step; infinite if the run diverged."""
        return math.inf if self.diverged else self.points[-1].loss

    @property
    def test_loss(self) -> float:
        """The loss on the test data; infinite if the run diverged."""
        return math.inf if self.diverged or self.result.test is None else self.result.test["all"]

    def first_at(self, target: float) -> Point | None:
        """Return the first evaluation at or below `target`, or None."""
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
