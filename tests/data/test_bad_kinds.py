"""Bad records of every format: each has its reason, all are listed at once, or dropped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune.data.bad_records import BadRecords
from finetune.data.encode import EncodedDataset, encode
from finetune.data.formats.detect import build_format
from finetune.data.sources import load_records, stream_records
from finetune.errors import UserError
from tests.data.settings import format_options, source
from tests.data.stock import MakeTokenizer


def said(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD: dict[str, dict[str, Any]] = {
    "chat": said(("user", "a"), ("assistant", "b")),
    "translation": {"translation": {"en": "a", "fr": "b"}},
    "text": {"text": "a b"},
}
BAD: list[tuple[str, Any, str]] = [
    # format, record -> the reason
    ("chat", said(("user", "a"), ("assistant", "")), "message 2 (assistant) is empty"),
    ("chat", said(("user", " \n"), ("assistant", "b")), "message 1 (user) is empty"),
    ("chat", said(("user", "a"), ("assistant", None)), "must be text, not None"),
    ("chat", said(("user", "a"), ("assistant", 4)), "must be text, not 4"),
    ("chat", said(("user", "a")), "has no assistant turn"),
    ("chat", said(), "has no assistant turn"),
    ("chat", said(("assistant", "a"), ("user", "b")), "message 1 is from assistant at the start"),
    (
        "chat",
        said(("user", "a"), ("user", "b"), ("assistant", "c")),
        "message 2 is from user after",
    ),
    ("chat", said(("user", "a"), ("assistant", "b"), ("assistant", "c")), "Set data.merge_turns"),
    ("chat", said(("user", "a"), ("system", "b"), ("assistant", "c")), "message 2 is from system"),
    (
        "chat",
        said(("user", "a"), ("tool", "b"), ("assistant", "c")),
        "message 2 is from tool after",
    ),
    ("chat", said(("bot", "a"), ("assistant", "b")), "the unknown role 'bot'"),
    ("chat", said((None, "a"), ("assistant", "b")), "the unknown role None"),
    (
        "chat",
        said(("user", [{"type": "text", "text": {"a": 1}}]), ("assistant", "b")),
        "message 1 has a part of the content whose text is {'a': 1}. Parts must be like",
    ),
    (
        "chat",
        said(("user", "a"), ("assistant", [{"type": "text", "text": 3}])),
        "message 2 has a part of the content whose text is 3. Parts must be like",
    ),
    (
        "chat",
        said(("user", "a"), ("assistant", [{"type": "text", "text": None}])),
        "not text alone",
    ),
    ("chat", {"messages": ["a", "b"]}, "must be an object with role and content"),
    ("chat", {"messages": "a"}, "a conversation is a list of messages"),
    ("chat", {"messages": None}, "a conversation is a list of messages"),
    ("chat", {"text": "a"}, "column 'messages' is missing"),
    ("chat", {"messages": "", "id": None, "topic": " "}, "every column is empty. Remove the rec"),
    ("translation", {"translation": None, "id": ""}, "every column is empty. Remove the record"),
    ("translation", {"translation": {"en": "a", "fr": ""}}, "the pair has an empty side: 'fr'"),
    ("translation", {"translation": {"en": "a", "fr": None}}, "the pair has an empty side: 'fr'"),
    ("translation", {"translation": {"en": "a"}}, "column 'fr' is missing"),
    ("translation", {"translation": {"en": "a", "fr": 7}}, "the side 'fr' must be text, not 7"),
    ("translation", {"translation": None}, "must hold an object such as"),
    ("text", {"text": 3}, "column 'text' must hold text, not 3"),
    ("text", {"text": ["a"]}, "column 'text' must hold text"),
    ("text", {"title": "a"}, "column 'text' is missing"),
]


def encoded(
    records: Any, kind: str, make_tokenizer: MakeTokenizer, bad: BadRecords
) -> EncodedDataset:
    format = build_format(
        "auto", format_options(), tokenizer=make_tokenizer(), first_record=GOOD[kind]
    )
    return encode(records, format, max_length=64, overlong="truncate", vocab_size=10_000, bad=bad)


@pytest.mark.parametrize("number", range(len(BAD)))
def test_each_bad_record_has_its_reason(number: int, make_tokenizer: MakeTokenizer) -> None:
    kind, record, expected = BAD[number]
    records = [("a line 1", GOOD[kind]), ("a line 2", record), ("a line 3", GOOD[kind])]
    with pytest.raises(UserError) as caught:
        encoded(records, kind, make_tokenizer, BadRecords())
    assert str(caught.value).startswith("a line 2: ")
    assert expected in str(caught.value)
    bad = BadRecords("drop")
    assert len(encoded(records, kind, make_tokenizer, bad)) == 2
    assert bad.count == 1


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("read", [load_records, stream_records])
def test_all_are_listed_at_once_by_file_and_line_or_dropped(
    kind: str, read: Any, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    found = [record for of, record, _ in BAD if of == kind]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(record) for bad in found for record in (bad, GOOD[kind])]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        encoded(read([source(path)]), kind, make_tokenizer, BadRecords())
    message = str(caught.value)
    assert message.startswith(f"{len(found)} records cannot be used: {path} line")
    listed = {2 * n + 1 for n in range(len(found))}
    for number in sorted(listed)[:20]:
        assert re.search(rf"(lines?|,) {number}(:|,| )", message)
    bad = BadRecords("drop")
    data = encoded(read([source(path)], on_bad="drop"), kind, make_tokenizer, bad)
    assert (len(data), data.statistics.bad_records, bad.count) == (len(found),) * 3


def test_joined_turns_mend_what_stands_twice(make_tokenizer: MakeTokenizer) -> None:
    record = said(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"))
    tokenizer = make_tokenizer()
    format = build_format(
        "auto", format_options(merge_turns=True), tokenizer=tokenizer, first_record=record
    )
    [example] = format.examples(record)
    assert tokenizer.decode(list(example.input_ids)) == (
        "<|im_start|>user\na\n\nb<|im_end|>\n<|im_start|>assistant\nc\n\nd<|im_end|>"
    )


def test_there_was_something_to_check() -> None:
    assert len(BAD) == 30
