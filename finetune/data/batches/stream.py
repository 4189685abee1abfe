"""Training batches from a stream of rows that is too long to hold.

Floor 1: the stream comes in as a plain object. Rows are encoded as they come and pass three buffers: a shuffle buffer, a window
of examples that is packed (or sorted by length) at a time, and the rows made of it. Every process walks the whole stream and
keeps its share of each step, which costs each the tokenizing of all rows and needs no communication: the steps are those of one
process.

The state holds the place in the stream, the contents of the buffers and the random generator, so a resumed run goes on with the
very next batch and reads nothing twice.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from random import Random
from typing import Any, Protocol

import torch

from finetune.data.batches.collate import collate
from finetune.data.batches.packing import pack
from finetune.data.batches.steps import StepBatch, group_by_length, share
from finetune.data.encode import RowEncoder, require_targets
from finetune.data.types import Example, Row
from finetune.errors import UserError

_WINDOW = 8  # steps' worth of tokens that are packed together
_HASHED_ROWS = 16


class RowSource(Protocol):
    """A stream of (where, row) that knows its place; each iteration is one pass."""

    def __iter__(self) -> Iterator[tuple[str, Row]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StreamingBatches:
    """Optimizer steps without end, pass after pass over the stream; the last step of a pass may be smaller.

    `shuffle_buffer`: examples held back, of which the next one is drawn at random. `fingerprint`: a hash of the first rows' tokens.
    """

    steps_per_epoch = None

    def __init__(
        self,
        rows: RowSource,
        encoder: RowEncoder,
        *,
        packing: bool,
        batch_size: int,
        micro_batch_size: int,
        shuffle_buffer: int,
        pad_id: int,
        seed: int,
        rank: int,
        num_processes: int,
    ) -> None:
        self.rows = rows
        self.encoder = encoder
        self.packing = packing
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.shuffle_buffer = shuffle_buffer
        self.pad_id = pad_id
        self.rank = rank
        self.num_processes = num_processes
        self._generator = torch.Generator().manual_seed(seed)
        self._buffer: list[Example] = []
        self._window: list[Example] = []
        self._ready: list[list[Example]] = []
        self._source: Iterator[tuple[str, Row]] | None = None
        self._epoch = 0
        self.fingerprint = self._hash_first_rows()

    def __iter__(self) -> Iterator[StepBatch]:
        while True:
            rows = list(islice(iter(self._next_row, None), self.batch_size))
            if rows:
                yield self._step(rows)
            else:
                require_targets(self.encoder.statistics, max_length=self.encoder.max_length)
            if len(rows) < self.batch_size:
                self._epoch, self._source = self._epoch + 1, None

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as plain values and tensors."""
        buffers = {
            "buffer": [[e] for e in self._buffer],
            "window": [[e] for e in self._window],
            "ready": self._ready,
        }
        return {
            "epoch": self._epoch,
            "rows": None if self._source is None else self.rows.state_dict(),
            "generator": self._generator.get_state(),
            "statistics": self.encoder.statistics.as_dict(),
            "fingerprint": self.fingerprint,
            **{name: _as_tensors(rows) for name, rows in buffers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises UserError where the stream does not begin as it did."""
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                "the training data does not begin as it did when this run was started (or its format, tokenizer or max_length "
                "changed), so the run cannot be resumed; restore the data, or start a new run in another output_dir"
            )
        self._epoch = state["epoch"]
        self._source = None
        if state["rows"] is not None:
            self.rows.load_state_dict(state["rows"])
            self._source = iter(self.rows)
        self._generator.set_state(state["generator"])
        vars(self.encoder.statistics).update(state["statistics"])
        self._buffer = [example for (example,) in _from_tensors(state["buffer"])]
        self._window = [example for (example,) in _from_tensors(state["window"])]
        self._ready = _from_tensors(state["ready"])

    def _next_row(self) -> list[Example] | None:
        """The next row, or None at the end of the pass."""
        if not self._ready:
            self._fill_window()
            self._ready = self._rows_of_window()
        return self._ready.pop() if self._ready else None

    def _fill_window(self) -> None:
        size = sum(map(len, self._window))
        while size < self._window_tokens and (example := self._draw()) is not None:
            self._window.append(example)
            size += len(example)

    @property
    def _window_tokens(self) -> int:
        return _WINDOW * self.batch_size * self.encoder.max_length

    def _rows_of_window(self) -> list[list[Example]]:
        """The window as rows in random order; the emptiest one stays in the window while there is more to come."""
        examples, lengths = self._window, list(map(len, self._window))
        if not examples:
            return []
        if self.packing:
            rows = pack(lengths, self.encoder.max_length)
            rows.sort(key=lambda row: sum(lengths[i] for i in row), reverse=True)
            kept = rows.pop() if sum(lengths) >= self._window_tokens and len(rows) > 1 else []
            order = torch.randperm(len(rows), generator=self._generator).tolist()
            self._window = [examples[i] for i in kept]
            return [[examples[i] for i in rows[r]] for r in order]
        seed = int(torch.randint(2**62, (), generator=self._generator))
        order = group_by_length(
            range(len(examples)),
            lengths,
            window=len(examples),
            group=self.batch_size,
            generator=Random(seed),
        )
        self._window = []
        return [[examples[i]] for i in reversed(order)]  # taken from the end

    def _draw(self) -> Example | None:
        """A random example out of the shuffle buffer, which is filled up first; None where the pass has ended."""
        if self._source is None:
            self._source = iter(self.rows)
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

    def _step(self, rows: list[list[Example]]) -> StepBatch:
        parts = share(
            len(rows),
            micro_batch_size=self.micro_batch_size,
            rank=self.rank,
            num_processes=self.num_processes,
        )
        return StepBatch(
            micro_batches=[
                collate(
                    [rows[i] for i in part],
                    pad_id=self.pad_id,
                    packed=self.packing,
                    max_length=self.encoder.max_length,
                )
                for part in parts
            ],
            num_target_tokens=sum(
                example.num_target_tokens for example in chain.from_iterable(rows)
            ),
            num_tokens=sum(map(len, chain.from_iterable(rows))),
            epoch=float(self._epoch),
            example_ids=[],
        )

    def _hash_first_rows(self) -> str:
        encoder = self.encoder
        probe = RowEncoder(
            encoder.format,
            max_length=encoder.max_length,
            overlong=encoder.overlong,
            vocab_size=encoder.vocab_size,
        )
        examples = [
            example
            for where, row in islice(self.rows, _HASHED_ROWS)
            for example in probe(where, row)
        ]
        return hashlib.sha256(
            repr([(list(e.input_ids), list(e.labels)) for e in examples]).encode()
        ).hexdigest()


def _as_tensors(rows: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
    """Rows of examples, end to end, for a checkpoint."""
    examples = list(chain.from_iterable(rows))
    return {
        "input_ids": torch.tensor(
            [token for e in examples for token in e.input_ids], dtype=torch.int32
        ),
        "labels": torch.tensor([label for e in examples for label in e.labels], dtype=torch.int32),
        "lengths": torch.tensor([len(e) for e in examples], dtype=torch.int64),
        "row_sizes": torch.tensor([len(row) for row in rows], dtype=torch.int64),
    }


def _from_tensors(state: dict[str, torch.Tensor]) -> list[list[Example]]:
    lengths = state["lengths"].tolist()
    parts = zip(state["input_ids"].split(lengths), state["labels"].split(lengths))
    examples = iter([Example(ids.tolist(), labels.tolist()) for ids, labels in parts])
    return [list(islice(examples, size)) for size in state["row_sizes"].tolist()]
