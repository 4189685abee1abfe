"""The progress of a command: a live line on a terminal, plain lines elsewhere.

Only the main process shows anything. Everything goes to stderr; stdout has only results. With -q
nothing is shown but what `Display.answer` prints, and with -v each step is a line.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from finetune.errors import is_terminal, visible
from finetune.run.log import VERBOSITY, Journal, Listener
from finetune.run.metrics import METRICS
from finetune.run.records import Evaluation, StepRecord
from finetune.run.wording import clock

PLAIN_INTERVAL = 5.0  # seconds between two plain lines
_WITH_BAR = 120  # columns of a terminal that also has room for the bar


def on_terminal(text: str) -> str:
    """Return `text` as it goes to stdout: on a terminal its control characters are escaped."""
    return visible(text) if is_terminal(sys.stdout) else text


def plain_console(
    file: IO[str] | None = None, *, width: int | None = None, soft_wrap: bool = False
) -> Console:
    """Return a console that prints text as it is, on `file` or stdout.

    To rich "[v1]" would be markup and ":x:" an emoji. Paths, names and texts may hold either.
    """
    return Console(
        file=file, width=width, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False
    )


class _Unheard:
    """A stream that goes on if nobody reads it any more: a closed pipe or terminal, a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Display:
    """The progress and the notes of one command."""

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        stream = cast(IO[str], _Unheard(sys.stderr))
        self._console = console or plain_console(stream, soft_wrap=True)
        self.verbosity = os.environ.get(VERBOSITY, "")
        self.heard = enabled  # a person reads what this process prints
        self.journal = Journal()
        # What a reader of the run should know. `recipes` writes it into environment.json.
        self.notes: list[str] = []
        self.warned: list[str] = []  # those of the notes that warn

    @property
    def enabled(self) -> bool:
        """Whether progress is shown."""
        return self.heard and self.verbosity != "quiet"

    def say(self, text: str) -> None:
        """Print one line about the progress, which the run's log gets too."""
        self.journal.add(visible(text))
        if self.enabled:
            self._print(text)

    def answer(self, text: str) -> None:
        """Print a line that belongs to an error or that was asked for: with -q too."""
        self.journal.add(visible(text))
        if self.heard:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(visible(text), markup=False)

    def say_at_once(self, text: str) -> None:
        """Print a line from the handler of a signal, in which no stream may be used."""
        if self.enabled:
            with contextlib.suppress(AttributeError, OSError):  # stderr is closed, or no file
                place = sys.stderr.fileno()
                start = "\n" if os.isatty(place) else ""  # not behind a live line
                os.write(place, f"{start}{text}\n".encode())

    def note(self, text: str) -> None:
        """Print a line that also belongs in the run's record, such as a choice that was made."""
        self.notes.append(text)
        self.say(text)

    def warn(self, text: str) -> None:
        """Print and keep a note that the reader should look at: something may be wrong."""
        self.warned.append(text)
        self.note(text)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Turn each warning that the package logs into a note that warns."""
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
    def steps(
        self,
        num_steps: int | None,
        first_step: int,
        *,
        label: str = "training",
        limit: float | None = None,
    ) -> Iterator[Listener]:
        """Show training. The yielded listener takes the trainer's records.

        It shows the step, the loss, the learning rate, the speed, and the time elapsed and left.
        `num_steps` is None if `limit`, in seconds, ends the run.
        """
        with self._progress(label, num_steps, start=first_step, limit=limit) as update:

            def listen(record: StepRecord | Evaluation) -> None:
                if isinstance(record, Evaluation):
                    self.say(f"step {record.step}: held-out {format_metrics(record.metrics)}")
                else:
                    speed = f"{record.tokens_per_second:.0f} tokens/s"
                    update(record.step, f"loss {record.loss:.3f}  lr {record.lr:.1e}  {speed}")

            yield listen

    @contextmanager
    def _progress(
        self, label: str, total: int | None, *, start: int = 0, limit: float | None = None
    ) -> Iterator[Callable[[int, str], None]]:
        if not self.enabled:
            yield lambda done, facts: None
        elif self._is_live() and self.verbosity != "verbose":
            times = _TimesColumn(limit)
            columns = (
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                *([BarColumn(bar_width=24)] if self._console.width >= _WITH_BAR else []),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                _FactsColumn(),
                times,
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(label, total=total, completed=start, facts="")

                def update(done: int, facts: str) -> None:
                    times.begin(progress.tasks[0], done)
                    progress.update(task, completed=done, facts=facts)

                yield update
        else:
            yield self._plain_lines(label, total, start, limit)

    def _is_live(self) -> bool:
        """Return whether a line can be drawn again. In a shell of Emacs (TERM=dumb) none can."""
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _plain_lines(
        self, label: str, total: int | None, start: int, limit: float | None
    ) -> Callable[[int, str], None]:
        began, first, shown = 0.0, start, 0.0
        interval = 0.0 if self.verbosity == "verbose" else PLAIN_INTERVAL

        def update(done: int, facts: str) -> None:
            nonlocal began, first, shown
            now = time.monotonic()
            if not began:  # the rate does not count the time before the first update
                began, first = now, done
            elif now - shown < interval and done != total:
                return
            shown = now
            seconds = now - began
            left = None
            if total and first < done < total:
                left = (total - done) * seconds / (done - first)
            ending = f"  {_times(seconds, _sooner(left, limit, seconds))}" if seconds else ""
            self._print(f"{label} {done}{f'/{total}' if total else ''}  {facts}{ending}")

        return update


class _FactsColumn(ProgressColumn):
    """The loss, the rate and the speed, cut off where a narrow terminal has no room for them."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["facts"], no_wrap=True, overflow="ellipsis")


class _TimesColumn(ProgressColumn):
    """The time elapsed, and the time left as soon as it is known, at the mean rate so far.

    Neither the rate nor a limit of time counts what came before the first update.
    """

    def __init__(self, limit: float | None) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._limit = limit
        self._first: tuple[int, float] | None = None  # what was done by then, and the time elapsed

    def begin(self, task: Task, done: int) -> None:
        """Count from here on, unless an earlier call said so."""
        self._first = self._first or (done, task.elapsed or 0.0)

    def render(self, task: Task) -> Text:
        elapsed, left = task.elapsed or 0.0, None
        first, began = self._first or (task.completed, elapsed)
        if task.total and first < task.completed < task.total:
            left = (elapsed - began) * (task.total - task.completed) / (task.completed - first)
        return Text(_times(elapsed, _sooner(left, self._limit, elapsed - began)))


def _sooner(left: float | None, limit: float | None, elapsed: float) -> float | None:
    """Return the seconds until the end, be it by the number of steps or by a limit of time."""
    ends = [left] if left is not None else []
    return min([*ends, *([max(0.0, limit - elapsed)] if limit is not None else [])], default=None)


def _times(elapsed: float, left: float | None) -> str:
    return f"{clock(elapsed)} elapsed" + (f", {clock(left)} left" if left else "")


class _NoteHandler(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self._display.notes:  # models are made more than once
            self._display.warn(record.getMessage())


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
