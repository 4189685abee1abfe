"""Rows from several sources: held in tables, or read as a stream.

Floor 2.

**Several sources.** They are interleaved evenly, always in the same order. Without weights each row comes once: a source is
drawn in proportion to its size (streams, whose size is not known, take turns; when one has run out, the others go on). With
weights the shares are exact, and the mix ends when the first source has run out: no row comes twice, and what the others still
had is left for no one.
"""

import copy
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from finetune.data.sources.opening import Source, explained, open_source
from finetune.data.types import Row
from finetune.errors import UserError

_CHUNK = 1000  # rows fetched at a time: several times as fast as one by one


class Rows:
    """Rows in memory-mapped tables, each known by its source and number there. Iterating gives (where, row)."""

    def __init__(
        self, tables: Sequence[Any], labels: Sequence[str], picks: Iterable[tuple[int, int]]
    ) -> None:
        self._tables, self._labels = tables, labels
        self._table_of, self._row_of = array("i"), array("q")
        for table, row in picks:
            self._table_of.append(table)
            self._row_of.append(row)

    def __len__(self) -> int:
        return len(self._row_of)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._tables[self._table_of[index]][self._row_of[index]]

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for start in range(0, len(self), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(self)))
            wanted: dict[int, list[int]] = {}
            for i in chunk:
                wanted.setdefault(self._table_of[i], []).append(self._row_of[i])
            found = {
                table: iter(self._tables[table].__getitems__(rows))
                for table, rows in wanted.items()
            }
            for i in chunk:
                yield self.describe(i), next(found[self._table_of[i]])

    def describe(self, index: int) -> str:
        """Where the row is, e.g. "train.jsonl, row 12" (counted from 1)."""
        return f"{self._labels[self._table_of[index]]}, row {self._row_of[index] + 1}"

    def select(self, indices: Sequence[int]) -> "Rows":
        return Rows(
            self._tables, self._labels, ((self._table_of[i], self._row_of[i]) for i in indices)
        )

    def take(self, count: int | None) -> "Rows":
        """The first so many rows; None: all."""
        return self if count is None else self.select(range(min(count, len(self))))


class RowStream:
    """Rows read as they are needed. Each iteration is one pass; (where, row). The state is the one after the row last given."""

    def __init__(
        self,
        streams: Sequence[Any],
        labels: Sequence[str],
        weights: Sequence[float] | None,
        files: Sequence[list[Path]],
    ) -> None:
        self._streams, self._labels, self._weights, self._files = streams, labels, weights, files
        self._places: list[Callable[[], Any]] = []
        self._counts: list[int] = []
        self._resume: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        # Copied here and not when the first row is asked for: that may happen in another thread, where fsspec fills the cache of
        # file systems that is being copied.
        state, self._resume = self._resume, None
        live = [copy.deepcopy(stream) for stream in self._streams]
        self._counts = [0] * len(live)
        self._places = [stream.state_dict for stream in live]
        if state is not None:
            self._counts = list(state["counts"])
            for k, place in enumerate(state["places"]):
                live[k].load_state_dict(place)
                self._places[k] = partial(
                    copy.deepcopy, place
                )  # a stream that is not read yet forgets what it was told to load
        return self._read(live)

    def _read(self, live: Sequence[Any]) -> Iterator[tuple[str, Row]]:
        iterators = [iter(stream) for stream in live]
        active = list(range(len(iterators)))
        shares = self._weights or [1.0] * len(iterators)
        while active:
            k = min(active, key=lambda k: (self._counts[k] + 1) / shares[k])
            with explained(self._labels[k], self._files[k]):
                row = next(iterators[k], None)
            self._places[k] = live[k].state_dict
            if row is not None:
                self._counts[k] += 1
                yield f"{self._labels[k]}, row {self._counts[k]}", row
            elif self._weights is None:
                active.remove(k)
            else:
                return

    def state_dict(self) -> dict[str, Any]:
        """The place in each source, as plain values."""
        if self._resume is not None:  # told where to go on, and not read since
            return copy.deepcopy(self._resume)
        return {"counts": list(self._counts), "places": [place() for place in self._places]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on from there."""
        self._resume = copy.deepcopy(state)


def load_rows(sources: Sequence[Source]) -> Rows:
    """All rows of the sources, interleaved. Raises UserError where a source cannot be read."""
    weights = _weights(sources)
    tables = [open_source(source, streaming=False) for source in sources]
    sizes = [
        min(len(table), source.max_rows or len(table)) for source, table in zip(sources, tables)
    ]
    for source, size in zip(sources, sizes):
        if size == 0:
            raise UserError(f"{source} is empty: there are no rows in it")
    return Rows(tables, [str(source) for source in sources], _interleave(sizes, weights))


def stream_rows(sources: Sequence[Source]) -> RowStream:
    """The rows of the sources as a stream. Raises UserError where a source cannot be opened; later, where a row cannot be read."""
    weights = _weights(sources)
    opened = [open_source(source, streaming=True) for source in sources]
    streams = [
        stream if source.max_rows is None else stream.take(source.max_rows)
        for source, stream in zip(sources, opened)
    ]
    return RowStream(
        streams,
        [str(source) for source in sources],
        weights,
        [source.files() for source in sources],
    )


def split_held_out(rows: Rows, *, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """(The rest, a random `fraction` of the rows held out): at least one row each; those held out in random order."""
    if len(rows) < 2:
        raise UserError(
            "there is one row only, so none can be held out; give data.validation, or set data.validation_fraction: 0"
        )
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    held_out = Random(f"{seed}/held out").sample(range(len(rows)), count)
    taken = set(held_out)
    return rows.select([i for i in range(len(rows)) if i not in taken]), rows.select(held_out)


def _weights(sources: Sequence[Source]) -> list[float] | None:
    given = [source.weight for source in sources if source.weight is not None]
    if len(given) not in (0, len(sources)):
        raise UserError("give every source a weight, or none")
    return given if len(given) > 1 else None


def _interleave(sizes: Sequence[int], weights: Sequence[float] | None) -> Iterator[tuple[int, int]]:
    """(source, row) in the order of the mix; see the module's text."""
    shares = weights or sizes
    counts = [0] * len(sizes)
    while True:
        k = min(range(len(sizes)), key=lambda k: (counts[k] + 1) / shares[k])
        if counts[k] == sizes[k]:
            return
        yield k, counts[k]
        counts[k] += 1
