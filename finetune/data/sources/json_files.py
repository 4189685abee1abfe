"""JSON files: one object a line, or one document with a list of objects.

A record is exactly the object in the file: no type is guessed, and no key is added.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.sources.files import Lines, kind_ending, open_bytes
from finetune.data.types import Record
from finetune.errors import UserError

_LOOKED_AT = 5  # lines
_IN_A_RECORD = ("tools", "functions")  # lists of objects, as the messages are
_NO_CHARACTER = "has half of a surrogate pair, such as \\ud83d, which is no character"
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # where a text may have half of a surrogate pair


class JsonLines:
    """A file with one JSON object a line; blank lines are passed over."""

    def records(self, lines: Lines) -> Iterator[tuple[int, Record | str]]:
        """Yield (line, record), or what is wrong with the line instead of the record."""
        for line in lines:
            if text := line.strip():
                yield lines.number, _read(text)


class CheckedJsonLines(JsonLines):
    """As `JsonLines`, for records that it has found in the file before: only the object is read."""

    def records(self, lines: Lines) -> Iterator[tuple[int, Record | str]]:
        """Yield (line, record), or a text if the line is not what it was."""
        for line in lines:
            if text := line.strip():
                try:
                    yield lines.number, json.loads(text)
                except ValueError:
                    yield lines.number, "is another line now"


def looks_like_json(line: str) -> bool:
    """Return whether the first line of a file begins records of JSON."""
    text = line.strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text in ("[", "{", "[{")
    return isinstance(value[0] if isinstance(value, list) and value else value, dict)


def _may_be_json(text: str) -> bool:
    """Return whether a line is a value of JSON, or begins one that is broken or goes on."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text.startswith(("{", "["))
    return True


def is_document(file: Path) -> bool:
    """Return whether a JSON file is one document, and not one object a line.

    Raises UserError for a file whose first lines are not JSON at all.
    """
    with open_bytes(file) as stream:
        texts = (text for line in Lines(file, stream) if (text := line.strip()))
        first, second, *others = [*islice(texts, _LOOKED_AT), None, None]
    is_single = second is None
    is_json = kind_ending(file) == ".json"
    if first and not any(text and _may_be_json(text) for text in (first, second, *others)):
        raise UserError(
            f"{file} is no JSON: it begins with {first[:40]!r}. If it is a table, name it .csv or "
            ".tsv, and if it is text, .txt"
        )
    if first is None or not first.startswith(("{", "[")):
        return False
    try:
        is_list = isinstance(json.loads(first), list)
        return is_single and (is_list or is_json)
    except json.JSONDecodeError as error:
        if second is not None and first.startswith("{") and isinstance(_read(second), dict):
            return False  # the first of many lines is broken
        return first.startswith("[") or is_json or error.pos >= len(first)
    except (ValueError, RecursionError):
        return False


def document_records(file: Path) -> Iterator[tuple[int, Record | str]]:
    """Yield (line, record) for a document: a list of objects or of texts, or one object.

    Raises UserError for a document that is neither, or is broken.
    """
    with open_bytes(file) as stream:
        text = "".join(Lines(file, stream)).rstrip()
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno} is broken JSON: {_problem(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is broken JSON: {_lower(error)}") from error
    if isinstance(document, dict):
        _check_single(file, document)
        yield 1, _read(text)
        return
    number, end = 1, text.index("[") + 1
    decoder = json.JSONDecoder()
    for item in document:
        start = _next_item(text, end)
        number += text.count("\n", end, start)
        end = decoder.raw_decode(text, start)[1]
        yield number, _text(item) if isinstance(item, str) else _read(text[start:end])
        number += text.count("\n", start, end)


def _next_item(text: str, position: int) -> int:
    """Return where the next item of a list begins, after the comma and the white space."""
    while text[position] in ", \t\r\n":
        position += 1
    return position


def _check_single(file: Path, document: dict[str, Any]) -> None:
    """Raise UserError for an object that holds many records, and is not one record itself."""
    lists = {key: value for key, value in document.items() if isinstance(value, list) and value}
    if any(
        isinstance(value[0], dict) and {"role", "from"} & set(value[0]) for value in lists.values()
    ):
        return  # a conversation
    for key, value in lists.items():
        if all(isinstance(item, dict) for item in value) and key not in _IN_A_RECORD:
            raise UserError(
                f"{file} holds one object with the records in its key {key!r}. Write that list "
                "alone to the file"
            )
    lengths = {len(value) for value in lists.values()}
    if len(document) > 1 and len(lists) == len(document) and len(lengths) == 1:
        raise UserError(
            f"{file} holds one object with a list for each column. Write one object for each record"
        )


def _read(text: str) -> Record | str:
    """Return the object in the text, or what is wrong with it."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return f"is broken JSON: {_problem(error)}"
    except RecursionError:
        return "is broken JSON: it is nested too deeply"
    except ValueError as error:
        return f"is broken JSON: {_lower(error)}"
    if not isinstance(value, dict):
        return f"must be a JSON object, such as {{...}}, not {text[:60]!r}"
    if _HALF.search(text) and not _is_whole(value):
        return _NO_CHARACTER
    return value


def _text(item: str) -> Record | str:
    """Return the record of a text, or what is wrong with it."""
    return {"text": item} if _is_whole(item) else _NO_CHARACTER


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is there twice")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_without_twins)


def _is_whole(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _problem(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' starting at').lower()} at column {error.colno}"


def _lower(error: Exception) -> str:
    message = str(error)
    return message[:1].lower() + message[1:]
