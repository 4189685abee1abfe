"""Named arrays on disk under keys, memory-mapped when they are read. The oldest make room.

An entry is a folder: a file of plain numbers for each array, and `entry.json`, which has their
hashes. It is written beside its place and renamed, so a reader finds all of it or nothing. Numbers
and JSON cannot run anything. A damaged entry is deleted, and counts as none.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

CACHE_BYTES = 10 * 10**9  # of all entries
Numbers = array | np.ndarray
_RECORD = "entry.json"
_BROKEN_OFF = 86_400  # seconds after which the folder of a writer that died is deleted
_READ = 1 << 20  # bytes at a time


@dataclass(frozen=True)
class Entry:
    """What is kept under a key: plain values, and arrays by name."""

    values: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    hashes: Mapping[str, str]  # of the bytes of the arrays


class Store:
    """The entries in a folder, of at most `most_bytes` in all.

    Only `draft` raises OSError, if the disk refuses.
    """

    def __init__(self, folder: Path, *, most_bytes: int = CACHE_BYTES) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    def read(self, key: str) -> Entry | None:
        """Return the entry; None if there is none, or it is damaged."""
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            entry = _read(folder)
            os.utime(folder)  # when it was last used
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return entry

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Hold a key, so that another process waits for the entry and does not make it too.

        On a disk without locks both make it, and either is as good.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.folder / f".lock-{key[0]}").open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def write(self, key: str, values: Mapping[str, Any], arrays: Mapping[str, Numbers]) -> None:
        """Keep values and arrays, if the disk lets it."""
        with contextlib.suppress(OSError):
            draft = self.draft(key)
            try:
                for name, numbers in arrays.items():
                    draft.add(name, numbers)
                draft.finish(values)
            finally:
                draft.discard()

    def draft(self, key: str) -> "EntryDraft":
        """Begin an entry. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return EntryDraft(self, key)

    def prune(self) -> None:
        """Delete the entries that were not used for longest, until the rest is small enough."""
        entries = []
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):
                used = folder.stat().st_mtime
                if not folder.name.startswith("."):
                    entries.append((used, folder, sum(f.stat().st_size for f in folder.iterdir())))
                elif folder.is_dir() and used < time.time() - _BROKEN_OFF:
                    shutil.rmtree(folder, ignore_errors=True)
        total = sum(size for *_, size in entries)
        for _, folder, size in sorted(entries):
            if total <= self.most_bytes:
                return
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


class EntryDraft:
    """An entry that is being written, array by array and piece by piece."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._folder = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=store.folder))
        self._files: dict[str, tuple[IO[bytes], Any, str]] = {}

    def add(self, name: str, numbers: Numbers) -> None:
        """Append to an array. Raises OSError."""
        part = np.asarray(numbers)
        if name not in self._files:
            new = (self._folder / name).open("wb")
            self._files[name] = new, xxhash.xxh3_128(), part.dtype.str
        file, digest, _ = self._files[name]
        file.write(part.data)
        digest.update(part.data)

    def finish(self, values: Mapping[str, Any]) -> Entry:
        """Put the entry in its place and return it. Raises OSError."""
        arrays = {}
        for name, (file, digest, kind) in self._files.items():
            file.close()
            arrays[name] = {"type": kind, "hash": digest.hexdigest()}
        body = json.dumps({"values": values, "arrays": arrays})
        record = {"hash": xxhash.xxh3_128_hexdigest(body.encode()), "body": body}
        (self._folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        entry = _read(self._folder)  # its files stay mapped, also if they are deleted
        with contextlib.suppress(OSError):  # another process was faster, and its entry is as good
            self._folder.rename(self._store.folder / self._key)
        self.discard()
        self._store.prune()
        return entry

    def discard(self) -> None:
        """Delete what was written, unless it is in its place."""
        for file, *_ in self._files.values():
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _read(folder: Path) -> Entry:
    """Return the entry in a folder. Raises what reading a damaged one raises."""
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    if xxhash.xxh3_128_hexdigest(str(record["body"]).encode()) != record["hash"]:
        raise ValueError(f"{folder} is damaged")
    body = json.loads(record["body"])
    arrays = {}
    for name, about in body["arrays"].items():
        file, kind = folder / name, np.dtype(about["type"])
        if hash_bytes(file) != about["hash"]:
            raise ValueError(f"{file} is damaged")
        is_empty = file.stat().st_size == 0
        arrays[name] = np.zeros(0, kind) if is_empty else np.memmap(file, dtype=kind, mode="r")
    hashes = {name: about["hash"] for name, about in body["arrays"].items()}
    return Entry(body["values"], arrays, hashes)


def hash_numbers(numbers: Numbers) -> str:
    """Return the hash of an array, as an entry has it."""
    return xxhash.xxh3_128_hexdigest(np.asarray(numbers).data)


def key_of(*parts: object) -> str:
    """Return the key of an entry that is made from `parts`, by the code of this version."""
    text = repr([_code(), *parts])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


@cache
def _code() -> str:
    """Return a hash of the code that reads and encodes data, and the versions that it uses."""
    folder = Path(__file__).parents[1]
    files = [hash_bytes(file) for file in sorted(folder.rglob("*.py"))]
    return repr([files, *(version(name) for name in ("transformers", "tokenizers", "jinja2"))])


def hash_bytes(file: Path | IO[bytes]) -> str:
    """Return a hash of the bytes of a file, or of what is left of an open one. Raises OSError."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(file.open("rb")) if isinstance(file, Path) else file
        digest = xxhash.xxh3_128()
        while block := stream.read(_READ):
            digest.update(block)
        return digest.hexdigest()
