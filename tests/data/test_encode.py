"""Encoding: limits, counts, flat storage, and the errors that must come before the first step."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.bad_records import BadRecords
from finetune.data.encode import EncodedDataset, encode
from finetune.data.types import IGNORE_INDEX, Example, Prompt, Record
from finetune.errors import UserError


class Given:
    """A format whose records are examples: {"ids": [...], "prompt": tokens not learnt}."""

    name = "given"

    def examples(self, record: Record) -> list[Example]:
        ids, prompt = record["ids"], max(1, record["prompt"])
        if ids == "bad":
            raise UserError("the record is bad")
        return [Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:])] if ids else []

    def prompts(self, record: Record) -> list[Prompt]:
        return []

    @property
    def texts(self) -> "Given":
        return self

    def drafts(self, record: Record) -> list[Example]:
        return self.examples(record)

    def encode(self, given: list[Any]) -> list[Any]:
        return given


def records(*items: Mapping[str, Any]) -> list[tuple[str, Record]]:
    return [(f"data.jsonl, row {n}", item) for n, item in enumerate(items, start=1)]


def record(length: int, prompt: int = 1) -> dict[str, Any]:
    return {"ids": list(range(length)), "prompt": prompt}


def run(
    items: Iterable[tuple[str, Record]],
    *,
    overlong: str = "truncate",
    max_length: int = 10,
    vocab_size: int = 50,
    bad: BadRecords | None = None,
) -> EncodedDataset:
    return encode(
        items,
        Given(),
        max_length=max_length,
        overlong=overlong,
        vocab_size=vocab_size,
        bad=bad,
    )


def test_truncation_keeps_the_start_and_is_counted() -> None:
    dataset = run(
        records(record(4), record(14, prompt=3), record(14, prompt=12), {"ids": [], "prompt": 1})
    )
    assert [list(e.input_ids) for e in dataset] == [[0, 1, 2, 3], list(range(10))]
    assert list(dataset[1].labels) == [-100, -100, -100, 3, 4, 5, 6, 7, 8, 9]
    assert dataset.statistics.as_dict() == {
        "records": 4, "blank_records": 1, "bad_records": 0, "examples": 2, "tokens": 14,
        "target_tokens": 10, "truncated": 2, "split": 0, "without_target": 1, "dropped": 0,
        "duplicates": 0, "longest": 14,
    }  # fmt: skip


def test_overlong_examples_can_be_dropped() -> None:
    counts = run(records(record(4), record(14)), overlong="drop").statistics
    assert (counts.examples, counts.dropped, counts.truncated) == (1, 1, 0)


@given(st.integers(2, 9), st.integers(2, 40), st.integers(0, 12))
def test_a_split_example_is_learnt_whole_and_each_target_once(
    max_length: int, length: int, prompt: int
) -> None:
    whole = record(length, min(prompt, length - 1))
    [example] = Given().examples(whole)
    dataset = run(records(whole), overlong="split", max_length=max_length)
    parts, counts = list(dataset), dataset.statistics
    assert all(len(part) <= max_length for part in parts)
    assert [token for part in parts for token in list(part.labels)[1:]] == example.labels[1:]
    assert all(a.input_ids[-1] == b.input_ids[0] for a, b in pairwise(parts))
    assert counts.split == (length > max_length)
    assert counts.target_tokens == example.num_target_tokens
    assert (counts.truncated, counts.dropped, counts.longest) == (0, 0, length)
    assert counts.examples == len(parts) == max(1, -(-(length - 1) // (max_length - 1)))


def test_overlong_examples_can_be_an_error() -> None:
    with pytest.raises(
        UserError,
        match=r"data\.jsonl, row 2: the text has 14 tokens, more than data\.max_length = 10\. "
        r"Raise data\.max_length,",
    ):
        run(records(record(4), record(14)), overlong="error")


def test_what_is_stored_comes_back() -> None:
    items = records(record(4), record(9, prompt=5), record(1 + 1))
    dataset = run(items)
    assert dataset.lengths == [4, 9, 2]
    assert list(dataset.target_counts) == [3, 4, 1] == [e.num_target_tokens for e in dataset]
    with pytest.raises(IndexError):
        dataset[3]


def test_the_fingerprint_tells_other_data() -> None:
    prints = {
        run(records(*items)).fingerprint
        for items in (
            [record(4), record(5)],
            [record(5), record(4)],
            [record(4), record(5, 2)],
            [record(4)],
        )
    }
    assert len(prints) == 4
    assert run(records(record(4))).fingerprint in prints


def test_a_bad_record_is_named() -> None:
    with pytest.raises(UserError, match=r"^data\.jsonl, row 2: the record is bad$"):
        run(records(record(4), {"ids": "bad", "prompt": 1}))


def test_all_bad_records_are_listed() -> None:
    bad = {"ids": "bad", "prompt": 1}
    given = [(f"a.jsonl line {n}", item) for n, item in enumerate([record(4), bad, bad, bad])]
    with pytest.raises(UserError) as caught:
        run([*given, ("b.jsonl line 1", bad)])
    assert str(caught.value) == (
        "4 records cannot be used: a.jsonl lines 1, 2, 3, b.jsonl line 1: the record is bad. "
        "Mend them, or set data.on_bad_record=drop to go on without them"
    )
    with pytest.raises(UserError) as caught:
        run([(f"a.jsonl line {n}", [bad, record(12)][n % 2]) for n in range(60)], overlong="error")
    message = str(caught.value)
    assert message.startswith("60 records cannot be used: a.jsonl lines 0, 2, 4, ")
    assert "a.jsonl lines 1, 3" in message
    assert ": the text has 12 tokens, more than data.max_length = 10; and 40 more. " in message
    assert message.endswith("Mend them, or set data.on_bad_record=drop to go on without them")
    with pytest.raises(UserError, match=r"18, 19: the text .*; and 1 more\. Raise data"):
        run([(f"a.jsonl line {n}", record(12)) for n in range(21)], overlong="error")


def test_bad_records_are_dropped_and_counted() -> None:
    bad = BadRecords("drop")
    bad.add("data.jsonl line 7", " is broken JSON")
    dataset = run(records(record(4), {"ids": "bad", "prompt": 1}, record(5)), bad=bad)
    assert [len(example) for example in dataset] == [4, 5]
    assert (dataset.statistics.records, dataset.statistics.bad_records) == (2, 2)
    assert bad.sentence() == (
        "2 records cannot be used: data.jsonl line 7 is broken JSON; data.jsonl, row 2: the record "
        "is bad"
    )
    with pytest.raises(UserError, match=r"no records: all 1 were dropped \(1 record .*is bad\)$"):
        run(records({"ids": "bad", "prompt": 1}), bad=BadRecords("drop"))


def test_reading_stops_if_nothing_is_good() -> None:
    read = []

    def endless() -> Any:
        for number in range(10**6):
            read.append(number)
            yield f"line {number}", {"ids": "bad", "prompt": 1}

    with pytest.raises(
        UserError, match=r"^1,000 records cannot be used: line 0, line 1, .*; and 980"
    ):
        run(endless())
    assert 1000 <= len(read) <= 2000, "records are read a few hundred ahead"


def test_reading_goes_on_if_bad_records_are_dropped() -> None:
    bad = BadRecords("drop")
    items = [*[{"ids": "bad", "prompt": 1}] * 1500, record(4), record(5)]
    dataset = run(records(*items), bad=bad)
    assert (len(dataset), bad.count) == (2, 1500)


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    assert len(run(records(record(4)), vocab_size=4)) == 1
    with pytest.raises(
        UserError, match=r"row 1: token id 4 is outside the model's vocabulary of 4 rows"
    ):
        run(records(record(5)), vocab_size=4)


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    class Wrong(Given):
        def examples(self, record: Record) -> list[Example]:
            return [Example([1, 2], [IGNORE_INDEX, 99])]

    with pytest.raises(UserError, match="token id 99 is outside the model's vocabulary of 50 rows"):
        encode(records(record(2)), Wrong(), max_length=8, overlong="truncate", vocab_size=50)


def test_no_target_at_all_is_an_error() -> None:
    with pytest.raises(
        UserError,
        match="no target tokens in 2 records, so there is nothing to learn: 2 without a target "
        r"after the cut to data\.max_length = 10\. Raise data\.max_length",
    ):
        run(records(record(14, prompt=11), record(12, prompt=11)))
    with pytest.raises(UserError, match=r"2 over data.max_length = 10 and dropped"):
        run(records(record(14), record(12)), overlong="drop")
    with pytest.raises(UserError, match="the data holds no records"):
        run([])
