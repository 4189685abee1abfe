"""One thread that draws the tokens of all requests: what waits is answered as one batch."""

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from finetune.data.types import Tokenizer
from finetune.inference.batching import batches_of, way_of
from finetune.inference.decoder import Decoder, GenerationSettings, Way
from finetune.inference.generation import AnswerText
from finetune.models.describe import CausalLM

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may wait."""


@dataclass(frozen=True)
class Piece:
    """Text that an answer goes on with; at the end of the answer, why it ended."""

    text: str
    num_tokens: int  # of the answer so far
    ending: str | None = None  # "stop", "length", "error", or "closed" if the worker was stopped
    ids: Sequence[int] = ()  # all tokens of the answer, at its end


@dataclass(eq=False)
class Job:
    """A prompt to answer. `emit` gets the pieces, in the worker's thread."""

    prompt: Sequence[int]
    settings: GenerationSettings
    emit: Callable[[Piece], None]
    stops: Sequence[str] = ()  # texts before which the answer ends
    cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """End the answer: nobody reads it any more."""
        self.cancelled = True


class Worker:
    """The thread, and the requests that wait for it.

    `models` has the models by name, each in evaluation mode on its device. At most `batch_size`
    answers are drawn at a time, and at most `most_waiting` requests wait. Jobs that wait for the
    same model begin together as one batch, if it can read them together. After its first token a
    batch joins an earlier one, if the model's cache can be joined. Batches take turns, token by
    token, so that two models stream side by side.
    """

    def __init__(
        self,
        models: Mapping[str, CausalLM],
        tokenizers: Mapping[str, Tokenizer],
        *,
        batch_size: int,
        most_waiting: int,
    ) -> None:
        self._models, self._tokenizers = models, tokenizers
        self._ways = {name: way_of(model) for name, model in models.items()}
        self._batch_size, self._most_waiting = batch_size, most_waiting
        self._waiting: list[tuple[str, Job]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._batches: list[_Batch] = []
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def submit(self, model: str, job: Job) -> None:
        """Let `job` wait for the model of that name. Raises QueueFull."""
        with self._changed:
            if self._closing:
                job.emit(Piece("", 0, "closed"))
                return
            self._waiting = [each for each in self._waiting if not each[1].cancelled]
            if len(self._waiting) >= self._most_waiting:
                raise QueueFull
            self._waiting.append((model, job))
            self._changed.notify()

    @property
    def is_busy(self) -> bool:
        """Whether an answer is drawn, or a request waits."""
        with self._changed:
            return bool(self._waiting or self._batches)

    def stop(self) -> None:
        """End all answers at once. The thread ends after the token that it is at."""
        with self._changed:
            self._closing = True
            jobs = [job for _, job in self._waiting]
            jobs += [answer.job for batch in self._batches for answer in batch.answers]
            self._waiting = []
            self._changed.notify()
        for job in jobs:
            job.cancel()
            job.emit(Piece("", 0, "closed"))

    def close(self) -> None:
        """Stop, and wait for the thread."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while self._admit():
            for batch in self._batches:
                batch.step()

    def _admit(self) -> bool:
        """Begin with what waits, if there is room, and wait if there is nothing to do.

        Returns whether to go on.
        """
        with self._changed:
            self._batches = _joined([batch for batch in self._batches if batch.running])
            while not (self._batches or self._waiting or self._closing):
                self._changed.wait()
            count = max(0, self._batch_size - sum(len(batch.running) for batch in self._batches))
            taken, self._waiting = self._waiting[:count], self._waiting[count:]
            jobs: dict[str, list[Job]] = {}
            for name, job in taken:
                if not job.cancelled:
                    jobs.setdefault(name, []).append(job)
            self._batches += [
                _Batch(
                    self._models[name],
                    self._tokenizers[name],
                    [together[i] for i in members],
                    self._ways[name],
                )
                for name, together in jobs.items()
                for members in batches_of(
                    [job.prompt for job in together], self._ways[name], len(together)
                )
            ]
            return not self._closing


def _joined(batches: Sequence["_Batch"]) -> list["_Batch"]:
    """Return the batches. Those that can be one are."""
    found: list[_Batch] = []
    for batch in batches:
        if not any(earlier.join(batch) for earlier in found):
            found.append(batch)
    return found


class _Batch:
    """Jobs that are answered together. `running` has those whose answers go on, by number."""

    numbers = itertools.count()  # no two jobs have one number

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, jobs: Sequence[Job], way: Way
    ) -> None:
        self._model, self._tokenizer, self._way = model, tokenizer, way
        self.running = {next(self.numbers): _Answer(job, tokenizer) for job in jobs}
        self._decoder: Decoder | None = None

    @property
    def answers(self) -> list["_Answer"]:
        """Those that go on. Any thread may ask."""
        return list(self.running.values())

    def join(self, other: "_Batch") -> bool:
        """Take over the answers of another batch, if both have begun; return whether it could."""
        if self._model is not other._model or self._decoder is None or other._decoder is None:
            return False
        try:
            joins = self._decoder.join(other._decoder)
        except Exception:  # as in `step`: only these answers end
            logger.exception("two batches of answers could not be joined")
            self._fail()
            other._fail()
            return False
        if joins:
            self.running |= other.running
        return joins

    def step(self) -> None:
        """Draw one token for each answer; whatever fails ends the answers of this batch."""
        try:
            self._step()
        except Exception:  # the server outlives a request that breaks something
            logger.exception("a batch of answers failed")
            self._fail()

    def _fail(self) -> None:
        """End all answers with an error."""
        for answer in self.running.values():
            answer.end("error")
        self.running = {}

    def _step(self) -> None:
        if self._decoder is None:
            jobs = {number: answer.job for number, answer in self.running.items()}
            self._decoder = Decoder(
                self._model,
                {number: job.prompt for number, job in jobs.items()},
                {number: job.settings for number, job in jobs.items()},
                self._way,
            )
        drawn = dict(self._decoder.step())
        active = set(self._decoder.active)
        for number, answer in list(self.running.items()):
            ending = answer.add(drawn.get(number), goes_on=number in active)
            if ending is not None:
                del self.running[number]
                if number in active:
                    self._decoder.finish(number)


class _Answer:
    """The answer to one job so far."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self.job = job
        self._text = AnswerText(tokenizer)
        self._stops = StopTexts(job.stops)
        self._ids: list[int] = []

    def add(self, token: int | None, *, goes_on: bool) -> str | None:
        """Emit what `token` adds, and return why the answer ends, or None if it goes on.

        None for a token: the model ended its answer.
        """
        if self.job.cancelled:
            return "stop"
        if token is None:
            return self.end("stop")
        self._ids.append(token)
        text, stopped = self._stops.add(self._text.add(token))
        if stopped:
            return self._emit(text, "stop")
        if not goes_on:
            return self.end("length", before=text)
        if text:
            self._emit(text)
        return None

    def end(self, ending: str, before: str = "") -> str | None:
        """Emit what was held back, and the end."""
        text, stopped = self._stops.add(self._text.rest())
        held = "" if stopped else self._stops.rest()
        return self._emit(before + text + held, "stop" if stopped else ending)

    def _emit(self, text: str, ending: str | None = None) -> str | None:
        ids = tuple(self._ids) if ending else ()
        self.job.emit(Piece(text, len(self._ids), ending, ids))
        return ending


class StopTexts:
    """Text that ends before the first of some stop texts, which may come in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that is certain, and whether a stop text has come.

        An end that a stop text may begin with is held back.
        """
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if stop.startswith(text[-length:])), 0)
