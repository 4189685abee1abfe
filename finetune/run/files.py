"""The way of a record to the disk and back: whole or not at all, and one message if it fails."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.run.folder import RunDir, newest_checkpoint

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # where a text may have half of a surrogate pair


def path_of(given: str) -> Path:
    """Return the path that a user gave, with ~ written out; ~ and no user's name is a plain name.

    `Path.expanduser` raises an error for the latter.
    """
    return Path(os.path.expanduser(given))


def write_text(path: Path, text: str) -> None:
    """Put `text` in the place of the file at `path`.

    If the process dies meanwhile, the old file stays whole. Raises UserError if the disk refuses,
    or if the text has what UTF-8 cannot hold, such as the bytes of a file's name.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        part = error.object[max(0, error.start - 20) : error.end + 20]
        raise UserError(
            f"{str(path)!r} cannot be written: {part!r} is not UTF-8 text. If it names a "
            "file, rename that"
        ) from error
    write_bytes(path, data)


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` in the place of the file at `path`, as `write_text` does with text."""
    temporary = temporary_of(path)
    with _refusals(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def write_json(path: Path, values: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Put `values` in the place of the JSON file at `path`, as `write_text`. Raises UserError."""
    write_text(path, json.dumps(finite(values), indent=indent))


def temporary_of(path: Path) -> Path:
    """Return the file that is written before it takes the place of the one at `path`."""
    return path.with_name(f".{path.name.lstrip('.')}.tmp")


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add one JSON object a line to the file at `path`. Raises UserError if the disk refuses.

    It does not wait for the disk: a killed process may leave a line that is cut short.
    """
    text = "".join(json.dumps(finite(line), ensure_ascii=False) + "\n" for line in lines)
    with _refusals(path), path.open("ab") as file:
        file.write(text.encode("utf-8"))


def sync_file(path: Path) -> None:
    """Wait until the disk has what was appended to the file at `path`, if there is one.

    Raises UserError if the disk refuses.
    """
    if path.is_file():
        with _refusals(path), path.open("rb") as file:
            os.fsync(file.fileno())


def remove_file(path: Path) -> None:
    """Delete the file at `path`, if there is one. Raises UserError if the disk refuses."""
    if path.is_file():
        with _refusals(path, "deleted"):
            path.unlink()


def make_folder(path: Path) -> None:
    """Make the folder at `path` if it is not there. Raises UserError if the disk refuses."""
    with _refusals(path):
        path.mkdir(parents=True, exist_ok=True)


def read_text(path: Path) -> str:
    """Return the text of the file at `path`. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`, an empty one if there is no such file.

    Raises UserError if the file holds anything else.
    """
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        return dict(_parsed(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a valid JSON object ({error}). Restore or remove the file"
        ) from error


def _parsed(text: str) -> Any:
    """Return the value of a JSON document. Halves of surrogate pairs, which no file can hold,
    become question marks.
    """
    value = json.loads(text)
    if not _HALF.search(text):
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects in the file at `path`, one a line, and how many lines are not one.

    A killed process may leave a last line that is cut short. A file that is not there has no lines.
    Raises UserError if the file cannot be read.
    """
    objects, unreadable = [], 0
    for line in raw_lines(path):
        try:
            objects.append(dict(_parsed(line.decode())))
        except (ValueError, TypeError, RecursionError):
            unreadable += 1
    return objects, unreadable


def raw_lines(path: Path) -> list[bytes]:
    """Return the lines of the file at `path`, none if there is no such file.

    Only a line feed ends a line: an answer may hold other separators of Unicode. Raises UserError
    if the file cannot be read.
    """
    if not path.is_file():
        return []
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with NaN and infinity as text, because JSON has no such numbers."""
    return {
        key: finite(value)
        if isinstance(value, Mapping)
        else str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in values.items()
    }


@contextlib.contextmanager
def _refusals(path: Path, done: str = "written") -> Iterator[None]:
    """Raise a UserError for an OSError: the file, the reason, and what is left of the run."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} could not be {done}: {reason}{_left(path)}") from error


def _left(path: Path) -> str:
    run = RunDir(path.parent)
    with contextlib.suppress(UserError):  # of a damaged marker
        if not run.is_run():
            return ""
    newest = newest_checkpoint(run.checkpoints)
    if newest is None:
        return "; there is no checkpoint yet"
    return f"; the last complete checkpoint {newest} is untouched. Continue with --resume auto"


def sync_folder(folder: Path) -> None:
    """Write the new name of a file to the disk, on systems that can open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
