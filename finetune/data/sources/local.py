"""Local files as records: found again by their place in the file, or read as a stream.

Nothing is copied but what is compressed. What a file holds is what is read, whatever was read
from a file of that name before.
"""

import bisect
import itertools
import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Protocol

from finetune.data.bad_records import BadRecords
from finetune.data.encoding.store import Store, hash_bytes, key_of
from finetune.data.sources.files import Lines, compression, kind_of, open_bytes, without_end
from finetune.data.sources.json_files import (
    CheckedJsonLines,
    JsonLines,
    document_records,
    is_document,
)
from finetune.data.sources.tables import read_layout
from finetune.data.types import Record
from finetune.errors import UserError

Item = tuple[Callable[[], Any], str, Record]
"""One record of a stream: the place after it, where it is, and the record."""

_SKIPPED = 1 << 20  # bytes read at a time from a compressed file that cannot seek


class Reader(Protocol):
    """What reads the records in the lines of a file; instead of one, what is wrong with it."""

    def records(self, lines: Lines) -> Iterator[tuple[int, Record | str]]: ...


class TextLines:
    """A text file whose every line is a record with one column.

    Blank lines are passed over, unless `blanks` are to keep their places, as in aligned files.
    """

    def __init__(self, column: str, *, blanks: bool = False) -> None:
        self.column, self.blanks = column, blanks

    def records(self, lines: Lines) -> Iterator[tuple[int, Record | str]]:
        """Yield (line, record)."""
        for line in lines:
            if self.blanks or line.strip():
                yield lines.number, {self.column: without_end(line)}


def reader_of(file: Path) -> Reader | None:
    """Return what reads the file, or None for a JSON document, which is read whole."""
    kind = kind_of(file)
    if kind == "text":
        return TextLines("text")
    if kind == "json":
        return None if is_document(file) else JsonLines()
    return read_layout(file, kind)


def said_of(reader: Reader | None) -> str:
    """Return how a file is read."""
    settings = {} if reader is None else vars(reader)
    return f"{type(reader).__name__} {[item for item in settings.items() if item[0] != 'file']}"


class _Found:
    """The records of one file, each found again by its place in the file."""

    def __init__(
        self,
        file: Path,
        reader: Reader,
        limit: int | None,
        bad: BadRecords,
        store: Store | None,
    ) -> None:
        self._file, self._reader = file, reader
        self._again = CheckedJsonLines() if isinstance(reader, JsonLines) else reader
        self._starts, self._sizes, self.lines = array("q"), array("q"), array("q")
        self._copy: IO[bytes] | None = None
        self.hash = ""
        problems: list[tuple[int, str]] = []  # lines that are no records
        with open_bytes(file) as stream:
            if compression(file):
                self._copy = tempfile.TemporaryFile()  # noqa: SIM115
                weakref.finalize(self, self._copy.close)
                shutil.copyfileobj(stream, self._copy)
                self._copy.seek(0)
            source = self._copy or stream
            self._state = _state(source)
            if store is None:
                self._find(source, limit, problems)
            else:
                self.hash = hash_bytes(source)
                self._find_in(store, source, limit, problems)
        for number, problem in problems:
            bad.add(f"{file} line {number}", f" {problem}")

    def _find(self, source: IO[bytes], limit: int | None, problems: list[tuple[int, str]]) -> None:
        """Find all records by reading the file."""
        source.seek(0)
        lines, start = Lines(self._file, source), 0
        for number, record in self._reader.records(lines):
            if isinstance(record, str):
                problems.append((number, record))
            else:
                self._starts.append(start)
                self._sizes.append(lines.offset - start)
                self.lines.append(number)
                if len(self.lines) == limit:
                    return
            start = lines.offset

    def _find_in(
        self, store: Store, source: IO[bytes], limit: int | None, problems: list[tuple[int, str]]
    ) -> None:
        """Find all records as an earlier run found them, or for later ones."""
        key = key_of("places", self.hash, said_of(self._reader), limit)
        entry = store.read(key)
        if entry is None:
            self._find(source, limit, problems)
            places = {"starts": self._starts, "sizes": self._sizes, "lines": self.lines}
            store.write(key, {"problems": problems}, places)
            return
        for numbers, name in ((self._starts, "starts"), (self._sizes, "sizes")):
            numbers.frombytes(entry.arrays[name].tobytes())
        self.lines.frombytes(entry.arrays["lines"].tobytes())
        problems += [(number, problem) for number, problem in entry.values["problems"]]

    def __len__(self) -> int:
        return len(self.lines)

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """Return the records of these numbers. Raises UserError if the file has changed."""
        with self._opened() as stream:
            if _state(stream) != self._state:
                raise self._changed()
            return [self._record(stream.fileno(), number) for number in numbers]

    def _record(self, descriptor: int, number: int) -> Record:
        start = self._starts[number]
        text = BytesIO(os.pread(descriptor, self._sizes[number], start))
        line = self.lines[number] if start else 1
        lines = Lines(self._file, text, number=line - 1, offset=start)
        _, record = next(self._again.records(lines), (0, ""))
        if isinstance(record, str):
            raise self._changed()
        return record

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        if self._copy is not None:
            yield self._copy
        else:
            with self._file.open("rb") as stream:
                yield stream

    def _changed(self) -> UserError:
        return UserError(f"{self._file} changed while it was read. Start again")


def _state(stream: IO[bytes]) -> tuple[int, int, int]:
    """Return what differs if a file is another one, or was written to."""
    found = os.fstat(stream.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


class _Held:
    """The records of a JSON document, held in memory."""

    def __init__(self, file: Path, limit: int | None, bad: BadRecords, store: Store | None) -> None:
        self.hash = "" if store is None else hash_bytes(file)
        self._records: list[Record] = []
        self.lines = array("q")
        for number, record in document_records(file):
            if isinstance(record, str):
                bad.add(f"{file} line {number}", f" {record}")
            elif len(self.lines) != limit:
                self._records.append(record)
                self.lines.append(number)

    def __len__(self) -> int:
        return len(self._records)

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """Return the records of these numbers."""
        return [self._records[number] for number in numbers]


class FileTable:
    """The records of local files, one file after another.

    `reader` returns what reads a file, or None for a JSON document. At most `limit` records are
    read. Lines that are no records are left out and noted in `bad`. `store` keeps the places of
    records from one run to the next.
    """

    def __init__(
        self,
        files: Sequence[Path],
        reader: Callable[[Path], Reader | None],
        limit: int | None,
        bad: BadRecords,
        store: Store | None = None,
    ) -> None:
        self._files = list(files)
        self._said: list[str] = []
        self._parts: list[_Found | _Held] = []
        self._ends: list[int] = []
        for file in files:
            left = None if limit is None else limit - len(self)
            if left == 0:
                break
            found = reader(file)
            part: _Found | _Held
            if found is None:
                part = _Held(file, left, bad, store)
            else:
                part = _Found(file, found, left, bad, store)
            self._parts.append(part)
            self._said.append(f"{file} {part.hash} {said_of(found)} {left}")
            self._ends.append(len(self) + len(part))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _place(self, number: int) -> tuple[int, int]:
        """Return the part that the record is in, and its number there."""
        part = bisect.bisect_right(self._ends, number)
        return part, number - (self._ends[part - 1] if part else 0)

    def __getitems__(self, numbers: Sequence[int]) -> list[Record]:
        """Return the records of these numbers, in their order."""
        found: list[Record] = []
        places = map(self._place, numbers)
        for part, group in itertools.groupby(places, key=lambda place: place[0]):
            found += self._parts[part].records([number for _, number in group])
        return found

    def where(self, number: int) -> str:
        """Return the file and the line of a record."""
        part, number = self._place(number)
        return f"{self._files[part]} line {self._parts[part].lines[number]}"

    def fingerprint(self) -> str | None:
        """Return what differs if the records do; None if the files were not hashed."""
        return "\n".join(self._said) if all(part.hash for part in self._parts) else None


class PickedTable:
    """Chosen records of several tables, one after another."""

    def __init__(self, tables: Sequence[FileTable], picks: Sequence[tuple[int, int]]) -> None:
        self._tables, self._picks = tables, picks

    def __len__(self) -> int:
        return len(self._picks)

    def __getitems__(self, numbers: Sequence[int]) -> list[Record]:
        places = [self._picks[number] for number in numbers]
        return [self._tables[table].__getitems__([item])[0] for table, item in places]

    def where(self, number: int) -> str:
        table, item = self._picks[number]
        return self._tables[table].where(item)

    def fingerprint(self) -> str | None:
        tables = [table.fingerprint() for table in self._tables]
        return None if None in tables else repr([tables, self._picks])


class FileStream:
    """The records of local files, read as they are needed. See FileTable for the arguments."""

    def __init__(
        self,
        files: Sequence[Path],
        reader: Callable[[Path], Reader | None],
        limit: int | None,
    ) -> None:
        self._files, self._limit = list(files), limit
        self._readers = [reader(file) for file in files]

    def read(self, place: Any, bad: BadRecords) -> Iterator[Item]:
        """Yield what follows a place, or everything for None.

        A line that is no record raises UserError, or is noted if `bad` drops.
        """
        number, offset, line, count = place or (0, 0, 0, 0)
        while number < len(self._files) and count != self._limit:
            for after, at, record in self._records(number, offset, line):
                where = f"{self._files[number]} line {at}"
                if isinstance(record, str):
                    bad.add(where, f" {record}")
                    bad.check()
                    continue
                count += 1
                here = [number, *after, count]
                yield (lambda here=here: here), where, record  # type: ignore[misc]
                if count == self._limit:
                    return
            number, offset, line = number + 1, 0, 0

    def _records(
        self, number: int, offset: int, line: int
    ) -> Iterator[tuple[tuple[int, int], int, Record | str]]:
        """Yield (bytes and lines read, line of the record, record) from a place in a file on."""
        file, reader = self._files[number], self._readers[number]
        if reader is None:
            found = itertools.islice(document_records(file), offset, None)
            for item, (at, record) in enumerate(found, start=offset + 1):
                yield (item, 0), at, record
            return
        with open_bytes(file) as stream:
            _skip(stream, offset)
            lines = Lines(file, stream, number=line, offset=offset)
            for at, record in reader.records(lines):
                yield (lines.offset, lines.number), at, record


def _skip(stream: IO[bytes], offset: int) -> None:
    if stream.seekable():
        stream.seek(offset)
        return
    while offset > 0 and (read := stream.read(min(offset, _SKIPPED))):
        offset -= len(read)


class AlignedTable:
    """The lines n of several tables as one record."""

    def __init__(self, sides: Sequence[FileTable]) -> None:
        self._sides = list(sides)

    def __len__(self) -> int:
        return len(self._sides[0])

    def __getitems__(self, numbers: Sequence[int]) -> list[Record]:
        """Return the records of these numbers, in their order."""
        return [_joined(parts) for parts in zip(*(s.__getitems__(numbers) for s in self._sides))]

    def where(self, number: int) -> str:
        """Return the file and the line of a record, in the first table."""
        return self._sides[0].where(number)

    def fingerprint(self) -> str | None:
        """Return what differs if the records do; None if the files were not hashed."""
        sides = [side.fingerprint() for side in self._sides]
        return None if None in sides else repr(sides)


class AlignedStream:
    """The lines n of several streams as one record."""

    def __init__(self, sides: Sequence[FileStream]) -> None:
        self._sides = list(sides)

    def read(self, place: Any, bad: BadRecords) -> Iterator[Item]:
        """Yield what follows a place, or everything for None."""
        places = place or [None] * len(self._sides)
        for items in zip(*(side.read(at, bad) for side, at in zip(self._sides, places))):
            after = [item[0]() for item in items]
            record = _joined([item[2] for item in items])
            yield (lambda after=after: after), items[0][1], record  # type: ignore[misc]


def _joined(parts: Sequence[Record]) -> Record:
    return {column: value for part in parts for column, value in part.items()}
