"""Records from several sources: held in tables, or read as a stream.

**Several sources.** They are interleaved evenly, always in the same order.

Without weights each record comes once: sources are drawn in proportion to their size. Streams,
whose size is not known, take turns; when one has ended, the others continue.

With weights the shares are exact, and the mix ends when the first source has ended. No record comes
twice, and what is left of the other sources is not used.
"""

import copy
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from finetune.data.sources.opening import Source, explained, open_source
from finetune.data.types import Record
from finetune.errors import UserError

_CHUNK = 1000  # records fetched at a time: several times as fast as one by one


class Records:
    """Records in memory-mapped tables, each known by its source and its number there.

    Iterating gives (where, record).
    """

    def __init__(
        self, tables: Sequence[Any], labels: Sequence[str], picks: Iterable[tuple[int, int]]
    ) -> None:
        self._tables, self._labels = tables, labels
        self._table_of, self._number_of = array("i"), array("q")
        for table, number in picks:
            self._table_of.append(table)
            self._number_of.append(number)

    def __len__(self) -> int:
        return len(self._number_of)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._tables[self._table_of[index]][self._number_of[index]]

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for start in range(0, len(self), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(self)))
            wanted: dict[int, list[int]] = {}
            for i in chunk:
                wanted.setdefault(self._table_of[i], []).append(self._number_of[i])
            found = {
                table: iter(self._tables[table].__getitems__(numbers))
                for table, numbers in wanted.items()
            }
            for i in chunk:
                yield self.describe(i), next(found[self._table_of[i]])

    def describe(self, index: int) -> str:
        """Return where the record is, e.g. "train.csv, row 12" (counted from 1)."""
        return f"{self._labels[self._table_of[index]]}, row {self._number_of[index] + 1}"

    def select(self, indices: Sequence[int]) -> "Records":
        picks = ((self._table_of[i], self._number_of[i]) for i in indices)
        return Records(self._tables, self._labels, picks)

    def take(self, count: int | None) -> "Records":
        """Return the first `count` records, or all of them for None."""
        return self if count is None else self.select(range(min(count, len(self))))


class RecordStream:
    """Records read as they are needed. Each iteration is one pass and gives (where, record).

    The state is the place after the last record given.
    """

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

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        # Copied here and not when the first record is asked for: that may happen in another thread,
        # where fsspec fills the cache of file systems that is being copied.
        state, self._resume = self._resume, None
        live = [copy.deepcopy(stream) for stream in self._streams]
        self._counts = [0] * len(live)
        self._places = [stream.state_dict for stream in live]
        if state is not None:
            self._counts = list(state["counts"])
            for k, place in enumerate(state["places"]):
                live[k].load_state_dict(place)
                # A stream that is not read yet forgets the state that it has loaded.
                self._places[k] = partial(copy.deepcopy, place)
        return self._read(live)

    def _read(self, live: Sequence[Any]) -> Iterator[tuple[str, Record]]:
        iterators = [iter(stream) for stream in live]
        active = list(range(len(iterators)))
        shares = self._weights or [1.0] * len(iterators)
        while active:
            k = min(active, key=lambda k: (self._counts[k] + 1) / shares[k])
            with explained(self._labels[k], self._files[k]):
                record = next(iterators[k], None)
            self._places[k] = live[k].state_dict
            if record is not None:
                self._counts[k] += 1
                yield f"{self._labels[k]}, row {self._counts[k]}", record
            elif self._weights is None:
                active.remove(k)
            else:
                return

    def state_dict(self) -> dict[str, Any]:
        """Return the place in each source, as plain values."""
        if self._resume is not None:  # a place was loaded, and nothing has been read since
            return copy.deepcopy(self._resume)
        return {"counts": list(self._counts), "places": [place() for place in self._places]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue at the place in `state`."""
        self._resume = copy.deepcopy(state)


def load_records(sources: Sequence[Source]) -> Records:
    """Return all records of the sources, interleaved. Raises UserError if one cannot be read."""
    weights = _weights(sources)
    tables = [open_source(source, streaming=False) for source in sources]
    sizes = [
        min(len(table), source.max_records or len(table)) for source, table in zip(sources, tables)
    ]
    for source, size in zip(sources, sizes):
        if size == 0:
            raise UserError(f"{source} is empty: it has no rows")
    return Records(tables, [str(source) for source in sources], _interleave(sizes, weights))


def stream_records(sources: Sequence[Source]) -> RecordStream:
    """Return the records of the sources as a stream.

    Raises UserError if a source cannot be opened; reading raises one if a record cannot be read.
    """
    weights = _weights(sources)
    opened = [open_source(source, streaming=True) for source in sources]
    streams = [
        stream if source.max_records is None else stream.take(source.max_records)
        for source, stream in zip(sources, opened)
    ]
    labels = [str(source) for source in sources]
    return RecordStream(streams, labels, weights, [source.files() for source in sources])


def split_held_out(records: Records, *, fraction: float, seed: int) -> tuple[Records, Records]:
    """Return (the rest, a random `fraction` of the records, held out).

    Each has at least one record. Those held out are in random order.
    """
    if len(records) < 2:
        raise UserError(
            "there is only one record, so none can be held out. Give data.validation, or set "
            "data.validation_fraction to 0"
        )
    count = min(max(1, round(fraction * len(records))), len(records) - 1)
    held_out = Random(f"{seed}/held out").sample(range(len(records)), count)
    taken = set(held_out)
    rest = [i for i in range(len(records)) if i not in taken]
    return records.select(rest), records.select(held_out)


def _weights(sources: Sequence[Source]) -> list[float] | None:
    given = [source.weight for source in sources if source.weight is not None]
    if len(given) not in (0, len(sources)):
        raise UserError(
            "some sources have a weight and some have not. Give every source one, or none"
        )
    return given if len(given) > 1 else None


def _interleave(sizes: Sequence[int], weights: Sequence[float] | None) -> Iterator[tuple[int, int]]:
    """Yield (source, number in it) in the order of the mix; see the module's text."""
    shares = weights or sizes
    counts = [0] * len(sizes)
    while True:
        k = min(range(len(sizes)), key=lambda k: (counts[k] + 1) / shares[k])
        if counts[k] == sizes[k]:
            return
        yield k, counts[k]
        counts[k] += 1
