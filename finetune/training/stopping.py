"""Why a run ends before its last step: a signal, bad data, or a loss that is beyond saving."""

import math
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from finetune.errors import UserError


class StopSignal:
    """A context in which the first SIGINT or SIGTERM sets `received`. A second one acts as usual.

    So does SIGHUP, of a terminal that is closed, unless it is ignored (nohup). A shell sends its
    jobs another one, so a second one does nothing more.

    Under an elastic launcher a second one is ignored. There a cluster sends its signal to every
    process, and the launcher passes on the one that it got itself. That second signal must not end
    the process while it saves. The launcher kills a process that does not end.

    `say` gets a line about the first one, within the signal's handler: it must be safe there.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.received, self._say = False, say
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore(*self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, True
        ends = "TORCHELASTIC_RUN_ID" not in os.environ
        if ends:
            self._restore(signal.SIGINT, signal.SIGTERM)
        if first:
            second = "Ctrl-C" if number == signal.SIGINT else "signal"
            then = f"; a second {second} ends at once, without one" if ends else ""
            self._say(f"stopping after this step or evaluation, and a checkpoint{then}")

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if (handler := self._previous.pop(number, None)) is not None:
                signal.signal(number, handler)  # type: ignore[arg-type]


class Diverged(UserError):
    """The end of a run whose loss is not a number, or far above its best."""


class NoBatch(UserError):
    """The end of a run whose stream of data cannot be read any further."""


_ABSURD = 300.0  # nats a token; a model that gave its data so little was lost
_FULL = 200  # target tokens of a step that counts in full
_DECAY = 0.9  # of the average, a full step
_AS_BEST, _AS_RISE = 0.27, 0.65  # weights of an average over 3 and over 10 full steps


class DivergenceGuard:
    """A watch over an exponential average of the step losses (nats, bias-corrected).

    It is over about ten steps, or as many as have 2,000 target tokens. The loss of a step of one
    short example says little: a first example of "Yes." is far below all that come later.
    """

    def __init__(self, *, threshold: float) -> None:
        self.threshold = threshold  # nats above the best average so far
        self._sum = self._weight = 0.0
        self._best = math.inf

    def problem(self, loss: float, grad_norm: float, num_targets: int) -> str | None:
        """Take in one step and return why the run must stop, or None.

        `loss` is the mean over the step's `num_targets` target tokens.
        """
        if not loss <= _ABSURD:
            return f"the loss is {loss:,.6g}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        kept = _DECAY ** min(1.0, num_targets / _FULL)
        self._sum = kept * self._sum + (1 - kept) * loss
        self._weight = kept * self._weight + (1 - kept)
        average = self._sum / self._weight
        if self._weight >= _AS_BEST:
            self._best = min(self._best, average)
        if self._weight >= _AS_RISE and average > self._best + self.threshold:
            return (
                f"the loss rose to {average:.2f}, from {self._best:.2f} at its best (averages over "
                "ten steps or more)"
            )
        return None

    def state_dict(self) -> dict[str, float]:
        return {"sum": self._sum, "weight": self._weight, "best": self._best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._sum, self._weight, self._best = state["sum"], state["weight"], state["best"]
