"""Training batches from a stream of records that is too long to hold in memory.

Records are encoded as they come and pass three buffers: a shuffle buffer, a window of examples that
are packed (or sorted by length) together, and the sequences made of it. Every process reads the
whole stream and keeps its share of each step. So each process tokenizes all records, and the steps
are the same as for one process without any communication.

The state holds the place in the stream, the contents of the buffers and the random generator. A
resumed run therefore continues with the very next batch and reads nothing twice. If a batch cannot
be read, the state is that of the batch before it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from random import Random
from typing import Any, Protocol

import torch

from finetune.data.bad_records import BadRecords
from finetune.data.batches.packing import pack
from finetune.data.batches.steps import BatchShape, StepBatch, group_by_length, lay_out
from finetune.data.encode import RecordEncoder, require_targets
from finetune.data.types import Example, Record
from finetune.errors import UserError

_WINDOW = 8  # steps' worth of tokens that are packed together
_HASHED_RECORDS = 16


class RecordSource(Protocol):
    """A stream of (where, record) that knows its place. Each iteration is one pass."""

    def __iter__(self) -> Iterator[tuple[str, Record]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StreamingBatches:
    """Optimizer steps without end, pass after pass over the stream.

    The last step of a pass may be smaller. `shuffle_buffer` is the number of examples held back,
    from which the next one is drawn at random. `fingerprint` is a hash of the first records'
    tokens.
    """

    steps_per_epoch = None

    def __init__(
        self,
        records: RecordSource,
        encoder: RecordEncoder,
        shape: BatchShape,
        *,
        shuffle_buffer: int,
    ) -> None:
        self.records = records
        self.encoder = encoder
        self.shape = shape
        self.shuffle_buffer = shuffle_buffer
        self._generator = torch.Generator().manual_seed(shape.seed)
        self._buffer: list[Example] = []
        self._window: list[Example] = []
        self._ready: list[list[Example]] = []
        self._source: Iterator[tuple[str, Record]] | None = None
        self._epoch = 0
        self._before: _State | None = None  # the state, while the next batch is read
        self.fingerprint = self._hash_first_records()

    def __iter__(self) -> Iterator[StepBatch]:
        passes_without = 0  # the rest of a pass may be empty after a resume, a whole one may not
        while True:
            self._before = self._state()
            sequences = list(islice(iter(self._next_sequence, None), self.shape.batch_size))
            passes_without = 0 if sequences else passes_without + 1
            if sequences:
                batch, self._before = self._step(sequences), None
                yield batch
            else:
                require_targets(
                    self.encoder.statistics,
                    max_length=self.encoder.max_length,
                    bad=self.encoder.bad,
                )
            if passes_without > 1:
                raise UserError(
                    f"pass {self._epoch + 1} over the training data gave no examples, and earlier "
                    "ones did. Restore the data, and go on with --resume auto"
                )
            if len(sequences) < self.shape.batch_size:
                self._epoch, self._source = self._epoch + 1, None

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as plain values and tensors."""
        state = self._state() if self._before is None else self._before
        buffers = {
            "buffer": [[e] for e in state.buffer],
            "window": [[e] for e in state.window],
            "ready": state.ready,
        }
        return {
            "epoch": state.epoch,
            "place": state.place,
            "generator": state.generator,
            "statistics": state.statistics,
            "fingerprint": self.fingerprint,
            **{name: _as_tensors(sequences) for name, sequences in buffers.items()},
        }

    def _state(self) -> "_State":
        return _State(
            epoch=self._epoch,
            place=None if self._source is None else self.records.state_dict(),
            generator=self._generator.get_state(),
            statistics=self.encoder.statistics.as_dict(),
            buffer=list(self._buffer),
            window=list(self._window),
            ready=list(self._ready),
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises UserError if the stream begins differently now."""
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                "the training data does not begin as it did when this run was started (or its "
                "format, tokenizer or max_length changed), so the run cannot be resumed. Restore "
                "the data, or start a new run in another output_dir"
            )
        self._epoch, self._before = state["epoch"], None
        self._source = None
        if state["place"] is not None:
            self.records.load_state_dict(state["place"])
            self._source = iter(self.records)
        self._generator.set_state(state["generator"])
        vars(self.encoder.statistics).update(state["statistics"])
        self._buffer = [example for (example,) in _from_tensors(state["buffer"])]
        self._window = [example for (example,) in _from_tensors(state["window"])]
        self._ready = _from_tensors(state["ready"])

    def _next_sequence(self) -> list[Example] | None:
        """Return the next sequence, or None at the end of the pass."""
        if not self._ready:
            self._fill_window()
            self._ready = self._sequences_of_window()
        return self._ready.pop() if self._ready else None

    def _fill_window(self) -> None:
        size = sum(map(len, self._window))
        while size < self._window_tokens and (example := self._draw()) is not None:
            self._window.append(example)
            size += len(example)

    @property
    def _window_tokens(self) -> int:
        return _WINDOW * self.shape.batch_size * self.encoder.max_length

    def _sequences_of_window(self) -> list[list[Example]]:
        """Return the window as sequences in random order.

        While more examples follow, the emptiest sequence stays in the window.
        """
        examples, lengths = self._window, list(map(len, self._window))
        if not examples:
            return []
        if self.shape.packing:
            packed = pack(lengths, self.encoder.max_length)
            packed.sort(key=lambda sequence: sum(lengths[i] for i in sequence), reverse=True)
            kept = packed.pop() if sum(lengths) >= self._window_tokens and len(packed) > 1 else []
            order = torch.randperm(len(packed), generator=self._generator).tolist()
            self._window = [examples[i] for i in kept]
            return [[examples[i] for i in packed[number]] for number in order]
        seed = int(torch.randint(2**62, (), generator=self._generator))
        order = group_by_length(
            range(len(examples)),
            lengths,
            window=len(examples),
            group=self.shape.batch_size,
            generator=Random(seed),
        )
        self._window = []
        return [[examples[i]] for i in reversed(order)]  # taken from the end

    def _draw(self) -> Example | None:
        """Return a random example from the shuffle buffer, which is filled up first.

        At the end of the pass the result is None.
        """
        if self._source is None:
            self._source = iter(self.records)
        while (
            len(self._buffer) < self.shuffle_buffer
            and (item := next(self._source, None)) is not None
        ):
            self._buffer.extend(self.encoder(*item))
        if not self._buffer:
            return None
        drawn = int(torch.randint(len(self._buffer), (), generator=self._generator))
        self._buffer[drawn], self._buffer[-1] = self._buffer[-1], self._buffer[drawn]
        return self._buffer.pop()

    def _step(self, sequences: list[list[Example]]) -> StepBatch:
        examples = list(chain.from_iterable(sequences))
        numbers = iter(range(len(examples)))
        micro_batches, _, num_computed = lay_out(
            [[next(numbers) for _ in sequence] for sequence in sequences],
            dict(enumerate(examples)),
            self.shape,
            max_length=self.encoder.max_length,
        )
        return StepBatch(
            micro_batches=micro_batches,
            num_target_tokens=sum(example.num_target_tokens for example in examples),
            num_tokens=sum(map(len, examples)),
            num_computed=num_computed,
            epoch=float(self._epoch),
            example_ids=[],
        )

    def _hash_first_records(self) -> str:
        encoder = self.encoder
        probe = RecordEncoder(
            encoder.format,
            max_length=encoder.max_length,
            overlong=encoder.overlong,
            vocab_size=encoder.vocab_size,
            bad=None if encoder.bad is None else BadRecords(encoder.bad.action),
        )
        first = islice(self.records, _HASHED_RECORDS)
        examples = [example for where, record in first for example in probe(where, record)]
        tokens = [(list(e.input_ids), list(e.labels)) for e in examples]
        return hashlib.sha256(repr(tokens).encode()).hexdigest()


@dataclass(frozen=True)
class _State:
    """What the next step of a stream depends on. What is read later does not change it."""

    epoch: int
    place: object  # in the stream; None: its start
    generator: torch.Tensor
    statistics: dict[str, int]
    buffer: list[Example]
    window: list[Example]
    ready: list[list[Example]]


def _as_tensors(sequences: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
    """Return sequences of examples end to end, for a checkpoint.

    `lengths` are the tokens of each example, `sizes` the examples of each sequence.
    """
    examples = list(chain.from_iterable(sequences))
    ids = [token for e in examples for token in e.input_ids]
    labels = [label for e in examples for label in e.labels]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int32),
        "labels": torch.tensor(labels, dtype=torch.int32),
        "lengths": torch.tensor([len(e) for e in examples], dtype=torch.int64),
        "sizes": torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64),
    }


def _from_tensors(state: dict[str, torch.Tensor]) -> list[list[Example]]:
    lengths = state["lengths"].tolist()
    parts = zip(state["input_ids"].split(lengths), state["labels"].split(lengths))
    examples = iter([Example(ids.tolist(), labels.tolist()) for ids, labels in parts])
    return [list(islice(examples, size)) for size in state["sizes"].tolist()]
