"""How far a run is, how long it is, and when it evaluates and saves."""

import math
from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a run is. A checkpoint stores it with weights, optimizer and place in the data."""

    step: int = 0  # optimizer steps taken
    num_target_tokens: int = 0  # seen so far
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    seconds: float = 0.0  # of the run's limit of time, used up to the last step
    guard: dict[str, float] = field(default_factory=dict)
    owed: bool = False  # the evaluation of this step: a signal came first, and a resume makes it


@dataclass(frozen=True)
class Cadence:
    """How long the run is, and after which optimizer steps it evaluates and saves.

    It evaluates at its end, after each `evaluate_every` steps, and each time that `evaluate_after`
    seconds of its limit of time have passed since the last evaluation. It saves at its end, at the
    best evaluation, and after each `checkpoint_every` steps. Where that is None it saves at each
    evaluation, and when `checkpoint_after` seconds have passed since the last checkpoint.
    """

    num_steps: int
    evaluate_every: int
    checkpoint_every: int | None
    best: str  # the key of the evaluation that decides which checkpoint is best
    higher_is_better: bool
    patience: int | None  # evaluations without improvement after which the run ends
    judged_by: str = ""  # measure, held-out data, settings: values of another one do not compare
    evaluate_after: float | None = None
    checkpoint_after: float = math.inf
