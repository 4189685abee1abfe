"""When to stop a run that is beyond saving: a loss that is not a number, or one that has left its best for good.

Floor 1.
"""

import math

from finetune.errors import UserError


class Diverged(UserError):
    """Training was stopped because the loss is not a number or has left its best for good."""


class DivergenceGuard:
    """Follows an exponential average of the step losses (nats, decay 0.9, bias-corrected)."""

    def __init__(self, *, threshold: float) -> None:
        self.threshold = threshold  # nats above the best average so far
        self._sum = self._weight = 0.0
        self._best = math.inf

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """Take in one step and return why the run must stop, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        self._sum, self._weight = 0.9 * self._sum + 0.1 * loss, 0.9 * self._weight + 0.1
        average = self._sum / self._weight
        self._best = min(self._best, average)
        if average > self._best + self.threshold:
            return f"the loss rose to {average:.2f}, from {self._best:.2f} at its best (averages over about ten steps)"
        return None

    def state_dict(self) -> dict[str, float]:
        return {"sum": self._sum, "weight": self._weight, "best": self._best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._sum, self._weight, self._best = state["sum"], state["weight"], state["best"]
