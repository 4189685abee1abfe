"""The turns that calls in one process take: runs in two threads would change each other's numbers.

The process has one random state of torch, from which weights and dropout are drawn, and one
precision of Accelerate.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from finetune.errors import UserError


class Turns:
    """One run at a time, and no evaluation beside it but its own."""

    def __init__(self) -> None:
        self._trains = threading.Lock()
        self._turn = threading.RLock()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Begin when evaluations have ended. Raises UserError if another call trains."""
        if not self._trains.acquire(blocking=False):
            raise UserError(
                "another call trains in this process, and both would draw from one random state. "
                "Wait until it ends, or train in a process of its own"
            )
        try:
            with self._turn:
                yield
        finally:
            self._trains.release()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Begin when other evaluations have ended. Raises UserError if another thread trains."""
        while not self._turn.acquire(timeout=0.1):  # a run may begin meanwhile
            if self._trains.locked():
                raise UserError(
                    "another thread of this process trains, and an evaluation would change its "
                    "random state. Wait until it ends, or evaluate in a process of its own"
                )
        try:
            yield
        finally:
            self._turn.release()


TURNS = Turns()
