"""The records of a run of a comparison: its settings, its outcome and its curves.

They are read from the run's folder. In a comparison the folder also holds `updates.jsonl` and
`result.json`, which is written last.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from finetune.errors import UserError
from finetune.run.files import append_lines, read_json_lines
from finetune.run.folder import RunDir
from finetune.run.records import Evaluation, JsonRecord, read_metrics

Phase = Literal["tuning", "reported"]


@dataclass(frozen=True)
class Result(JsonRecord):
    """result.json: the outcome of one run, written when the run is over.

    `test` is None for a tuning run, and for a run that diverged.
    """

    file = "result"

    optimizer: str
    phase: Phase
    seed: int
    settings: dict[str, Any]  # all options that the optimizer was built with
    problem: str  # why the run diverged; "" if it did not
    start: dict[str, str]  # hashes of the weights and of the training data that it began with
    state_bytes: int = 0  # of the optimizer, after the last step
    test: dict[str, float] | None = None  # nats per target token: "all", "head", "body", "tail"
    bins: dict[str, dict[str, int]] | None = None  # "tokens" of the vocabulary, test "targets"
    load: float | None = (
        None  # of the machine at the end: processes that ran or waited, of a minute
    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        test = values.get("test") or {}  # NaN and infinity are text in the file
        losses = {name: float(loss) for name, loss in test.items()} or None
        result = super().from_dict({**values, "test": losses})
        _ = result.lr, losses and losses["all"]  # an error here names the file
        return result

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
        test = self.result.test or {"all": 0.0}
        losses = self.points[-1].loss, test["all"]
        return self.result.problem != "" or not all(map(math.isfinite, losses))

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


def keep_update(run: RunDir, step: int, ratio: float) -> None:
    """Append the norm of an update over the norm of the weights. Raises UserError."""
    append_lines(run.updates, [{"step": step, "ratio": ratio}])


def read_trial(folder: Path) -> Run | None:
    """Return the run in `folder`, or None if it is not over.

    Raises UserError if one of its files is damaged.
    """
    run = RunDir(folder)
    if not run.result.is_file():
        return None
    points, steps, tokens, seconds = list[Point](), 0, 0, 0.0
    for record in read_metrics(run)[0]:
        if not isinstance(record, Evaluation):
            steps = record.step
            tokens += record.num_tokens
            seconds += record.seconds
        elif (loss := record.number("loss")) is not None:
            points.append(Point(record.step, loss, tokens, seconds))
    if not points:  # it was evaluated before its first step
        raise _damaged(run.metrics)
    lines, _ = read_json_lines(run.updates)
    try:  # the last of a repeated step counts
        updates = {int(line["step"]): float(line["ratio"]) for line in lines}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(run.updates) from error
    return Run(folder.name, Result.read(run), points, sorted(updates.items()), steps)


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is not what a run of a comparison writes. Delete {path.parent}, and the same "
        "command runs it again"
    )
