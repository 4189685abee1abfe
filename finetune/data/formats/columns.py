"""Columns of a record: read by the name that the format gives them, and found by other names.

`columns` maps what a format calls a column to what the data calls it, e.g. {"prompt": "question"}.
"""

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


def column(record: Record, name: str, columns: Mapping[str, str]) -> Any:
    """Return the value of the column. Raises UserError if it is missing."""
    given = columns.get(name, name)
    if given not in record:
        raise UserError(
            f"column {given!r} is missing; the columns are {', '.join(record) or 'none'}"
            f"{did_you_mean(given, record)}"
        )
    return record[given]


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
