"""Records from several sources: held in tables, or read as a stream.

**Several sources.** They are interleaved evenly, always in the same order.

Without weights each record comes once: sources are drawn in proportion to their size. Streams,
whose size is not known, take turns; when one has ended, the others continue.

With weights the shares are exact, and the mix ends when the first source has ended. No record comes
twice, and what is left of the other sources is not used.
"""

import copy
import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any, Literal

from finetune.data.bad_records import BadRecords
from finetune.data.encoding.store import Store
from finetune.data.sources.local import Item
from finetune.data.sources.opening import Source, Stream, Table, open_stream, open_table
from finetune.data.types import Record
from finetune.errors import UserError

_CHUNK = 1000  # records fetched at a time: several times as fast as one by one
_SHARE = 0.05  # of the records that is held out by default
_ENOUGH_HELD_OUT = 10  # records of little data that choose an epoch well (docs/measurements.md)
_LARGEST_SHARE = 0.2  # of it, at most


class Records:
    """Records of several tables, each known by its table and its number there.

    Iterating gives (where, record). `bad` has the lines of the sources that are no records.
    """

    def __init__(
        self, tables: Sequence[Table], picks: Iterable[tuple[int, int]], bad: BadRecords
    ) -> None:
        self._tables, self.bad = tables, bad
        self._table_of, self._number_of = array("i"), array("q")
        for table, number in picks:
            self._table_of.append(table)
            self._number_of.append(number)

    def __len__(self) -> int:
        return len(self._number_of)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._tables[self._table_of[index]].__getitems__([self._number_of[index]])[0]

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
        """Return where the record is, e.g. "train.csv line 12" (counted from 1)."""
        return self._tables[self._table_of[index]].where(self._number_of[index])

    def fingerprint(self) -> str | None:
        """Return what differs if the records, their order or their names do.

        None if a table does not know.
        """
        tables = [table.fingerprint() for table in self._tables]
        if None in tables:
            return None
        digest = hashlib.sha256(repr(tables).encode("utf-8", "surrogatepass"))
        digest.update(self._table_of)
        digest.update(self._number_of)
        return digest.hexdigest()

    def select(self, indices: Sequence[int]) -> "Records":
        picks = ((self._table_of[i], self._number_of[i]) for i in indices)
        return Records(self._tables, picks, self.bad)

    def without_bad(self) -> "Records":
        """Return the records without the note of bad ones, which another part keeps."""
        picks = zip(self._table_of, self._number_of)
        return Records(self._tables, picks, BadRecords(self.bad.action))

    def take(self, count: int | None) -> "Records":
        """Return the first `count` records, or all of them for None."""
        return self if count is None else self.select(range(min(count, len(self))))


class RecordStream:
    """Records read as they are needed. Each iteration is one pass and gives (where, record).

    The state is the place after the last record given.
    """

    def __init__(
        self, streams: Sequence[Stream], weights: Sequence[float] | None, bad: BadRecords
    ) -> None:
        self._streams, self._weights, self.bad = streams, weights, bad
        self._places: list[Callable[[], Any]] = []
        self._counts: list[int] = []
        self._resume: dict[str, Any] | None = None

    def fresh(self) -> "RecordStream":
        """Return the same stream from its start on, with a note of bad records of its own."""
        return RecordStream(self._streams, self._weights, BadRecords(self.bad.action))

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        state, self._resume = self._resume, None
        places = [None] * len(self._streams) if state is None else state["places"]
        self._counts = [0] * len(places) if state is None else list(state["counts"])
        self._places = [partial(copy.deepcopy, place) for place in places]
        return self._read(
            [stream.read(place, self.bad) for stream, place in zip(self._streams, places)]
        )

    def _read(self, iterators: Sequence[Iterator[Item]]) -> Iterator[tuple[str, Record]]:
        active = list(range(len(iterators)))
        shares = self._weights or [1.0] * len(iterators)
        while active:
            k = min(active, key=lambda k: (self._counts[k] + 1) / shares[k])
            item = next(iterators[k], None)
            if item is not None:
                self._places[k], where, record = item
                self._counts[k] += 1
                yield where, record
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


def load_records(
    sources: Sequence[Source], *, on_bad: str = "error", store: Store | None = None
) -> Records:
    """Return all records of the sources, interleaved.

    `on_bad` is "error" or "drop", for lines that are no records. `store` keeps where the records
    are from one run to the next. Raises UserError if a source cannot be read.
    """
    weights, bad = _weights(sources), BadRecords(on_bad)
    tables: list[Table] = []
    dropped: list[int] = []  # bad lines of each source
    for source in sources:
        known = bad.count
        tables.append(open_table(source, bad, store))
        dropped.append(bad.count - known)
    bad.check()
    sizes = [
        min(len(table), source.max_records or len(table)) for source, table in zip(sources, tables)
    ]
    for source, size, count in zip(sources, sizes, dropped):
        if size == 0:
            raise no_records(str(source), bad if count else None)
    return Records(tables, _interleave(sizes, weights), bad)


def no_records(source: str, bad: BadRecords | None) -> UserError:
    """Return the error for a source without a record; `bad` are its lines that are none."""
    if bad is None or bad.count == 0:
        return UserError(f"{source} is empty: it has no rows")
    return UserError(f"{source} has no row that can be used: {bad.sentence()}. Mend its rows")


def stream_records(sources: Sequence[Source], *, on_bad: str = "error") -> RecordStream:
    """Return the records of the sources as a stream; see `load_records` for `on_bad`.

    Raises UserError if a source cannot be opened; reading raises one if a record cannot be read.
    """
    weights = _weights(sources)
    return RecordStream([open_stream(source) for source in sources], weights, BadRecords(on_bad))


def count_held_out(
    num_records: int, *, fraction: float | Literal["auto"] = "auto", most: int | None = None
) -> int:
    """Return how many of two or more records are held out, at least one and `most` at most.

    auto: enough to choose an epoch by.
    """
    auto = min(_LARGEST_SHARE, max(_SHARE, _ENOUGH_HELD_OUT / num_records))
    share = auto if fraction == "auto" else fraction
    return min(max(1, round(share * num_records)), num_records - 1, most or num_records)


def split_held_out(
    records: Records, *, fraction: float | Literal["auto"], most: int | None = None, seed: int
) -> tuple[Records, Records]:
    """Return (the rest, the records that are held out), which are random and in random order.

    Each has at least one record; see `count_held_out`. Raises UserError if there is only one.
    """
    if len(records) < 2:
        raise UserError(
            "there is only one record, so none can be held out. Give data.validation, or set "
            "data.validation_fraction to 0"
        )
    count = count_held_out(len(records), fraction=fraction, most=most)
    held_out = Random(f"{seed}/held out").sample(range(len(records)), count)
    taken = set(held_out)
    rest = [i for i in range(len(records)) if i not in taken]
    return records.select(rest), records.select(held_out).without_bad()


def _weights(sources: Sequence[Source]) -> list[float] | None:
    given = [source.weight for source in sources if source.weight is not None]
    if len(given) not in (0, len(sources)):
        raise UserError(
            "some sources have a weight and some have not. Give every source one, or none"
        )
    return given if len(given) > 1 else None


def _interleave(sizes: Sequence[int], weights: Sequence[float] | None) -> Iterator[tuple[int, int]]:
    """Yield (source, number in it) in the order of the mix; see the module's text."""
    if len(sizes) == 1:
        yield from ((0, number) for number in range(sizes[0]))
        return
    shares = weights or sizes
    counts = [0] * len(sizes)
    while True:
        k = min(range(len(sizes)), key=lambda k: (counts[k] + 1) / shares[k])
        if counts[k] == sizes[k]:
            return
        yield k, counts[k]
        counts[k] += 1
