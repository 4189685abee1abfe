"""Local data files: which kind a name is, how a file is opened, and the lines in it."""

import bz2
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape, glob, has_magic
from importlib.resources import files
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from finetune.errors import UserError, did_you_mean
from finetune.run.files import path_of
from finetune.run.marker import MARKER
from finetune.run.wording import listed

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
PACKAGE = "package:"
BOM = "\ufeff"
_HELD_OUT = re.compile(
    r"(^|[-._ 0-9/])(validation|valid|dev|val|test|testing|eval|evaluation)[-._ 0-9/]"
)
"""What says in a path that a file is held out, as `datasets` reads it: in small letters alone."""


def local_files(path: str, *, is_text: bool = False) -> list[Path]:
    """Return the files that `path` names: a file, a glob, or package:NAME for the demo data.

    A file or folder of that very name is preferred to a glob. The result is empty for a folder or
    the name of a hub dataset. With `is_text`, files of any ending are text, and the name is none of
    the hub. Raises UserError for a local name without a file, or for an empty file.
    """
    if path.startswith(PACKAGE):
        return [_package_file(path)]
    given = path_of(path)
    if given.is_file():
        found = [given]
    elif given.is_dir():
        return []
    elif has_magic(path):
        found = sorted(Path(name) for name in glob(str(given), recursive=True))
        found = [file for file in found if file.is_file()]
        if not found:
            raise UserError(f"no file matches {path!r} (looked in {Path.cwd()})")
    elif is_text or _ending(given)[0] in KINDS or path.startswith((".", "/", "~")):
        raise UserError(f"there is no file or folder {path!r} (looked in {Path.cwd()})")
    else:
        return []
    for file in found:
        if not is_text:
            kind_of(file)
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty")
    return found


def kind_of(file: Path) -> str:
    """Return the kind of a data file by its ending, in capitals or not, compressed or not.

    Raises UserError if the ending is unknown.
    """
    ending, _ = _ending(file)
    if ending not in KINDS:
        raise UserError(
            f"{file} has the unknown ending {file.suffix!r}; known are {', '.join(KINDS)}, each "
            f"also with {', '.join(_COMPRESSED)}. If it is plain text, name it .txt"
        )
    if KINDS[ending] == "parquet" and compression(file):
        raise UserError(
            f"{file} is a compressed Parquet file. Decompress it: a Parquet file is compressed "
            "inside"
        )
    return KINDS[ending]


def kind_ending(file: Path) -> str:
    """Return the ending that names a file's kind, in small letters: ".json" of a.JSON.gz."""
    return _ending(file)[0]


def compression(file: Path) -> str:
    """Return the ending of a compressed file, such as ".gz"; "" for another file."""
    return _ending(file)[1]


def require_all(folder: Path, splits: Mapping[str, Sequence[Path]], every: Sequence[Path]) -> None:
    """Raise UserError if data files of a folder are in no split, and so would not be read.

    `every` has all its files. If the name of one says a split, `datasets` leaves out the others.
    """
    taken = {file for files in splits.values() for file in files}
    data = [file for file in every if kind_ending(file) in KINDS]
    others = [file for file in data if KINDS[kind_ending(file)] != "text"]
    if any(file in taken for file in others) or not taken & {*data}:
        data = others or data  # text files beside data are licences and notes
    lost = [file for file in data if file not in taken and not _is_of_run(file)]
    if not lost:
        return
    names = sorted(os.path.relpath(file, folder) for file in lost)
    shown = names if len(names) < 5 else [*names[:3], f"{len(names) - 3:,} more"]
    split, cause = next((split, files[0]) for split, files in splits.items() if files)
    depth = "**/" if any(os.sep in os.path.relpath(file, folder) for file in data) else ""
    pattern = f"{escape(str(folder))}/{depth}*{kind_ending(lost[0])}{compression(lost[0])}"
    raise UserError(
        f"{folder}: {listed(shown)} would not be read, since the name of "
        f"{os.path.relpath(cause, folder)} makes it the split {split!r} and leaves out the others. "
        f"Give the files that are meant by name or by a glob, such as {pattern!r}"
    )


def require_no_held_out(folder: Path, train: Sequence[Path]) -> None:
    """Raise UserError for training files of a folder whose names say in capitals another split."""
    names = [os.path.relpath(file, folder) for file in train]
    held_out = [n for n in names if _HELD_OUT.search(n.casefold()) and not _HELD_OUT.search(n)]
    if held_out:
        raise UserError(
            f"{folder}: {listed(sorted(held_out)[:4])} would be trained on, since a split is named "
            "in small letters. Name the files of a split so, such as train.jsonl and test.jsonl, "
            "or give the files that are meant by name"
        )


def _is_of_run(file: Path) -> bool:
    return any((folder / MARKER).is_file() for folder in file.parents)


def _ending(file: Path) -> tuple[str, str]:
    """Return the ending that names the kind, and that of the compression or ""."""
    last = file.suffix.lower()
    if last in _COMPRESSED:
        return Path(file.stem).suffix.lower(), last
    return last, ""


def _package_file(path: str) -> Path:
    folder = files("finetune") / "resources" / "data"
    names = sorted(
        entry.name.removesuffix(".jsonl")
        for entry in folder.iterdir()
        if entry.name.endswith(".jsonl")
    )
    name = path.removeprefix(PACKAGE)
    if name not in names:
        raise UserError(
            f"the package has no data {name!r}; it has {', '.join(names)}"
            f"{did_you_mean(name, names)}"
        )
    return Path(str(folder / f"{name}.jsonl"))


@contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed. Raises UserError if it is not what its name says."""
    ending = compression(file)
    try:
        with _decompressed(file, ending) as stream:
            yield stream
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(_not_whole(file, ending, error)) from error
    except OSError as error:  # of bz2 and zstd, which have no error of their own
        if not ending or error.errno is not None:
            raise
        raise UserError(_not_whole(file, ending, error)) from error


def _decompressed(file: Path, ending: str) -> IO[bytes]:
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if ending == ".bz2":
        return bz2.open(file)
    if ending == ".xz":
        return lzma.open(file)
    if ending == ".zst":  # not in Python before 3.14
        return BufferedReader(cast(RawIOBase, pa.input_stream(str(file), compression="zstd")))
    return file.open("rb")


def _not_whole(file: Path, ending: str, error: Exception) -> str:
    return (
        f"{file} is not a whole {ending} file ({str(error).rstrip('.').lower()}). Compress it "
        "again, or copy it again from where it came"
    )


class Lines(Iterator[str]):
    """The lines of an open file with their ends. Only \\n ends a line, as `wc -l` counts.

    A byte order mark is no text: it is left out at the start of the file, and of a line, where it
    is if files were joined. `number` counts the lines so far, and
    `offset` the bytes. Raises UserError for a line that is not UTF-8.
    """

    def __init__(self, file: Path, stream: IO[bytes], *, number: int = 0, offset: int = 0) -> None:
        self.file, self._stream = file, stream
        self.number, self.offset = number, offset

    def __next__(self) -> str:
        raw = self._stream.readline()
        if not raw:
            raise StopIteration
        self.number += 1
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.file} is not UTF-8 text (line {self.number}: {error.reason} at byte "
                f"{error.start + 1} of it). Save the file as UTF-8, e.g. with iconv"
            ) from error
        self.offset += len(raw)
        return line.lstrip(BOM)


def without_end(line: str) -> str:
    """Return the line without its end, which is \\n or \\r\\n."""
    return line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")


def read_lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file without their ends. Raises UserError if it is not UTF-8."""
    with open_bytes(file) as stream:
        yield from map(without_end, Lines(file, stream))
