"""A limit of time for a run: how much of it is used, the same on every process and after a resume.

The limit counts from the first step on, with the evaluations between the steps. What comes after
the last step is not counted.
"""

from time import monotonic

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR

TICKS = 100_000
"""The number of steps that a schedule by the clock has. It is at tick n after n / TICKS of the
time."""


class Clock:
    """The time that a run has used, of `limit` seconds."""

    def __init__(self, limit: float, accelerator: Accelerator) -> None:
        self.limit, self._accelerator = limit, accelerator
        self._before, self._began = 0.0, 0.0

    def start(self, used: float) -> None:
        """Begin to count. `used`: the seconds of earlier starts of the run."""
        self._before, self._began = used, monotonic()

    def read(self) -> float:
        """Return the seconds used so far. Every process calls this and gets the same."""
        used = self._before + monotonic() - self._began
        if self._accelerator.num_processes == 1:
            return used
        # of all processes, so that they end together
        seconds = torch.tensor(used, device=self._accelerator.device)
        return float(self._accelerator.reduce(seconds, reduction="mean"))

    def move(self, scheduler: LambdaLR, share: float) -> None:
        """Bring a schedule of TICKS steps to where it is after a share of the run."""
        scheduler.last_epoch = min(TICKS - 1, int(share * TICKS)) - 1
        scheduler.step()
