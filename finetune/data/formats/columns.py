"""Columns of a record: read by the name that the format gives them, and found by other names.

`columns` maps what a format calls a column to what the data calls it, e.g. {"prompt": "question"}.
"""

import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Any

from finetune.data.types import Record
from finetune.errors import UserError, did_you_mean

_ASKED = ("prompt", "instruction", "question", "query", "user", "human")
_ANSWERED = (
    *("completion", "output", "answer", "response", "assistant", "reply"),
    *("gpt", "bot", "target", "targets"),
)

_OTHER_NAMES = {"systemprompt": "system", "systemmessage": "system", "functions": "tools"}
_FALSE, _NOTHING = ("false",), ("false", "0", "0.0")
_SWITCHED_OFF = {
    **dict.fromkeys(("label", "kto_tag"), _FALSE),
    **dict.fromkeys(("weight", "loss_weight"), _NOTHING),
}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def column(record: Record, name: str, columns: Mapping[str, str]) -> Any:
    """Return the value of the column. Raises UserError if it is missing."""
    given = columns.get(name, name)
    if given not in record:
        raise UserError(
            f"column {given!r} is missing; the columns are {', '.join(record) or 'none'}"
            f"{did_you_mean(given, record)}"
        )
    return record[given]


def require_some_text(record: Record) -> None:
    """Raise UserError for a record without any value, such as a row of a table with commas alone.

    A record with one column or none is another mistake.
    """
    blank = all(v is None or (isinstance(v, str) and not v.strip()) for v in record.values())
    if blank and len(record) > 1:
        raise UserError("every column is empty. Remove the record, or set data.on_bad_record=drop")


def text_column(record: Record, name: str, columns: Mapping[str, str]) -> str:
    """Return the value of a column of text; a missing value (null) reads as empty."""
    value = column(record, name, columns)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"column {columns.get(name, name)!r} must hold text, not {value!r:.80}")
    return value


def other_case(given: Collection[str], known: Iterable[str]) -> dict[str, str]:
    """Return the columns that are called as in `known` but for capitals: {"text": "Text"}."""
    missing = [name for name in known if name not in given]
    names = {name.strip().lower(): name for name in given} if missing else {}
    return {name: names[name] for name in missing if name in names}


def other_names(given: Iterable[str]) -> dict[str, str]:
    """Return the optional columns of chats that have another name: {"system": "system_prompt"}."""
    names = {"".join(filter(str.isalnum, name.lower())): name for name in given}
    return {ours: names[other] for other, ours in _OTHER_NAMES.items() if other in names}


def is_something_else(name: str, value: object) -> bool:
    """Return whether a column that may be another name of `system` or `tools` is none of them."""
    ours = _OTHER_NAMES.get("".join(filter(str.isalnum, name.lower())))
    if ours == "tools" and not isinstance(value, str):
        return not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value))
    if ours == "tools":
        return not re.match(r"\s*(\[\s*[{\]]|$)", str(value))
    return ours == "system" and not isinstance(value, str)


def switches(given: Collection[str]) -> list[str]:
    """Return the columns that may say of a record that it is not to be learnt."""
    kinds = {*_SWITCHED_OFF, *_MEDIA}
    names = {name: name.strip().lower() for name in given}
    if not {"prompt", "completion"} <= {*names.values()}:  # else a label is a class
        kinds.remove("label")
    return [name for name, plain in names.items() if plain in kinds]


def is_switched_on(name: str, value: object) -> bool:
    """Return whether a switch says that the record is learnt, and not something else.

    Raises UserError if the record is not to be learnt, or is about images and the like.
    """
    kind, said = name.strip().lower(), str(value).strip().lower()
    if kind in _MEDIA:
        if _holds_media(value):
            raise UserError(
                f"the column {name!r} holds what a model of text cannot read. Leave the record "
                "out, set data.on_bad_record=drop, or remove the column"
            )
        return False
    if said in _SWITCHED_OFF[kind]:
        raise UserError(
            f"the column {name!r} is {value!r}, so the answer is not to be learnt. Leave the "
            "record out, set data.on_bad_record=drop, or rename the column"
        )
    return said == "true" or (_SWITCHED_OFF[kind] is _NOTHING and said in ("1", "1.0"))


def _holds_media(value: object) -> bool:
    """Return whether a column names or holds files; a single text may be a note about them."""
    if isinstance(value, Mapping):
        return any(value.get(key) is not None for key in ("bytes", "path", "url", "array"))
    if isinstance(value, list):
        return any(bool(item) and (isinstance(item, str) or _holds_media(item)) for item in value)
    return isinstance(value, bytes)


def usual_columns(given: Iterable[str]) -> dict[str, str]:
    """Return the chat's columns by the names that people use: {"prompt": "question", ...}.

    It is empty unless there is exactly one column with a question, and one with its answer.
    """
    names = {name.strip().lower(): name for name in given}
    asked, answered = _found(_ASKED, names), _found(_ANSWERED, names)
    context, own = _found(["input", "context"], names), {}
    if not asked:
        asked, context = _found(["input", "inputs"], names), _found(["context"], names)
        own = {"input": context[0]} if context else {}  # for `input` is the question
    if len(asked) != 1 or len(answered) != 1 or len(context) > 1:
        return {}
    if context:  # is written below the question, under either name
        return {"instruction": asked[0], "output": answered[0], **own}
    return {"prompt": asked[0], "completion": answered[0]}


def _found(usual: Sequence[str], names: Mapping[str, str]) -> list[str]:
    return [names[name] for name in usual if name in names]


def unused_columns(record: Record, used: Container[str]) -> set[str]:
    """Return what is not used of a record: the columns that have a value and are not in `used`."""
    return {
        f"the column {name!r}"
        for name, value in record.items()
        if name not in used and value not in (None, "", [], {})
    }


def unused_notes(counts: Counter[str]) -> list[str]:
    """Return a sentence for each thing that is not used, with the records that have it."""
    return [
        f"not used: {what} ({count:,} record{'s' * (count != 1)})"
        for what, count in sorted(counts.items())
    ]
