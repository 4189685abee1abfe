"""Ctrl-C and SIGTERM as a request: the step in progress ends, the run is saved, and it can be resumed.

Floor 1.
"""

import os
import signal
import threading
from types import FrameType, TracebackType


class StopSignal:
    """Within the context, the first SIGINT or SIGTERM sets `received`; a second one acts as it always does.

    Not so under an elastic launcher: a cluster sends its signal to every process, the launcher passes on the one that it got
    itself, and the second must not end the process in the middle of saving. What does not end, the launcher kills.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
