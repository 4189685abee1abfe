"""The progress of a command: a live line on a terminal, plain lines elsewhere.

Only the main process shows anything. Everything goes to stderr; stdout has only results.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from finetune.errors import visible
from finetune.run.log import Listener
from finetune.run.metrics import METRICS
from finetune.run.records import Evaluation, StepRecord
from finetune.run.wording import clock

PLAIN_INTERVAL = 5.0  # seconds between two plain lines


def on_terminal(text: str) -> str:
    """Return `text` as it goes to stdout: on a terminal its control characters are escaped."""
    return visible(text) if sys.stdout.isatty() else text


class Display:
    """The progress and the notes of one command."""

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.enabled = enabled
        # What a reader of the run should know. `recipes` writes it into environment.json.
        self.notes: list[str] = []

    def say(self, text: str) -> None:
        """Print one line about the progress."""
        if self.enabled:
            self._console.print(visible(text), markup=False)

    def note(self, text: str) -> None:
        """Print a line that also belongs in the run's record, such as a choice that was made."""
        self.notes.append(text)
        self.say(text)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Turn each warning that the package logs into a note."""
        logger, handler = logging.getLogger("finetune"), _NoteHandler(self)
        logger.addHandler(handler)
        propagate, logger.propagate = logger.propagate, False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate

    @contextmanager
    def bar(
        self, label: str, total: int | None, *, unit: str = ""
    ) -> Iterator[Callable[[int], None]]:
        """Show a bar. The yielded function advances it by a number of units."""
        with self._progress(label, total) as update:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                update(done, unit)

            yield advance

    @contextmanager
    def steps(self, num_steps: int, first_step: int) -> Iterator[Listener]:
        """Show training. The yielded listener takes the trainer's records.

        It shows the step, the loss, the learning rate, the speed and the time left.
        """
        with self._progress("training", num_steps, start=first_step) as update:

            def listen(record: StepRecord | Evaluation) -> None:
                if isinstance(record, Evaluation):
                    self.say(f"step {record.step}: held-out {format_metrics(record.metrics)}")
                else:
                    speed = f"{record.tokens_per_second:.0f} tokens/s"
                    update(record.step, f"loss {record.loss:.3f}  lr {record.lr:.1e}  {speed}")

            yield listen

    @contextmanager
    def _progress(
        self, label: str, total: int | None, *, start: int = 0
    ) -> Iterator[Callable[[int, str], None]]:
        if not self.enabled:
            yield lambda done, facts: None
        elif self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(label, total=total, completed=start, facts="")
                yield lambda done, facts: progress.update(task, completed=done, facts=facts)
        else:
            yield self._plain_lines(label, total, start)

    def _plain_lines(self, label: str, total: int | None, start: int) -> Callable[[int, str], None]:
        began, first, shown = 0.0, start, 0.0

        def update(done: int, facts: str) -> None:
            nonlocal began, first, shown
            now = time.monotonic()
            if not began:  # the rate does not count the time before the first update
                began, first = now, done
            elif now - shown < PLAIN_INTERVAL and done != total:
                return
            shown = now
            seconds = now - began
            if total and first < done < total:
                time_left = clock((total - done) * seconds / (done - first))
                ending = f"  {time_left} left"
            else:
                ending = f"  {clock(seconds)}" if done == total else ""
            self.say(f"{label} {done}{f'/{total}' if total else ''}  {facts}{ending}")

        return update


class _NoteHandler(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self._display.notes:  # models are made more than once
            self._display.note(record.getMessage())


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Return one line with the metrics that a terminal shows, as far as they were measured."""
    return "  ".join(
        f"{metric.short} {metric.show(metrics)}{'%' if metric.is_share else ''}"
        for metric in METRICS
        if metric.short and metric.key in metrics
    )


def differences(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """Return a listener of (number done, total) that passes the newly done ones to `advance`."""
    seen = 0

    def progress(done: int, _: int) -> None:
        nonlocal seen
        advance(done - seen)
        seen = done

    return progress
