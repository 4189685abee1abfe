"""Encoding: limits, counts, flat storage, and the errors that must come before the first step."""

from collections.abc import Mapping
from typing import Any

import pytest

from finetune.data.encode import EncodedDataset, encode
from finetune.data.types import IGNORE_INDEX, Example, Prompt, Row
from finetune.errors import UserError


class Given:
    """A format whose rows are examples already: {"ids": [...], "prompt": tokens that are no target}."""

    name = "given"

    def examples(self, row: Row) -> list[Example]:
        ids, prompt = row["ids"], max(1, row["prompt"])
        if ids == "bad":
            raise UserError("the row is bad")
        return [Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:])] if ids else []

    def prompts(self, row: Row) -> list[Prompt]:
        return []


def rows(*items: Mapping[str, Any]) -> list[tuple[str, Row]]:
    return [(f"data.jsonl, row {n}", item) for n, item in enumerate(items, start=1)]


def row(length: int, prompt: int = 1) -> dict[str, Any]:
    return {"ids": list(range(length)), "prompt": prompt}


def run(
    items: list[tuple[str, Row]],
    *,
    overlong: str = "truncate",
    max_length: int = 10,
    vocab_size: int = 50,
) -> EncodedDataset:
    return encode(items, Given(), max_length=max_length, overlong=overlong, vocab_size=vocab_size)


def test_truncation_keeps_the_start_and_is_counted() -> None:
    dataset = run(rows(row(4), row(14, prompt=3), row(14, prompt=12), {"ids": [], "prompt": 1}))
    assert [list(e.input_ids) for e in dataset] == [[0, 1, 2, 3], list(range(10))]
    assert list(dataset[1].labels) == [-100, -100, -100, 3, 4, 5, 6, 7, 8, 9]
    assert dataset.statistics.as_dict() == {
        "rows": 4, "blank_rows": 1, "examples": 2, "tokens": 14, "target_tokens": 10, "truncated": 2, "without_target": 1,
        "dropped": 0, "longest": 14,
    }  # fmt: skip


def test_overlong_examples_can_be_dropped() -> None:
    counts = run(rows(row(4), row(14)), overlong="drop").statistics
    assert (counts.examples, counts.dropped, counts.truncated) == (1, 1, 0)


def test_overlong_examples_can_be_an_error() -> None:
    with pytest.raises(
        UserError,
        match=r"data\.jsonl, row 2: the text has 14 tokens, more than data\.max_length 10; raise max_length",
    ):
        run(rows(row(4), row(14)), overlong="error")


def test_what_is_stored_comes_back() -> None:
    items = rows(row(4), row(9, prompt=5), row(1 + 1))
    dataset = run(items)
    assert dataset.lengths == [4, 9, 2]
    assert list(dataset.target_counts) == [3, 4, 1] == [e.num_target_tokens for e in dataset]
    assert [dataset.row_of(i) for i in range(3)] == [0, 1, 2]
    with pytest.raises(IndexError):
        dataset[3]


def test_the_fingerprint_tells_other_data() -> None:
    prints = {
        run(rows(*items)).fingerprint
        for items in ([row(4), row(5)], [row(5), row(4)], [row(4), row(5, 2)], [row(4)])
    }
    assert len(prints) == 4
    assert run(rows(row(4))).fingerprint in prints


def test_a_bad_row_is_named() -> None:
    with pytest.raises(UserError, match=r"^data\.jsonl, row 2: the row is bad$"):
        run(rows(row(4), {"ids": "bad", "prompt": 1}))


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    assert len(run(rows(row(4)), vocab_size=4)) == 1
    with pytest.raises(
        UserError, match=r"row 1: token id 4 is outside the model's vocabulary of 4 rows"
    ):
        run(rows(row(5)), vocab_size=4)


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    class Wrong(Given):
        def examples(self, row: Row) -> list[Example]:
            return [Example([1, 2], [IGNORE_INDEX, 99])]

    with pytest.raises(UserError, match="token id 99 is outside the model's vocabulary of 50 rows"):
        encode(rows(row(2)), Wrong(), max_length=8, overlong="truncate", vocab_size=50)


def test_no_target_at_all_is_an_error() -> None:
    with pytest.raises(
        UserError,
        match=r"no target tokens in 2 rows, so there is nothing to learn: 2 without a target after the cut to data.max_length = 10",
    ):
        run(rows(row(14, prompt=11), row(12, prompt=11)))
    with pytest.raises(UserError, match=r"2 over data.max_length = 10 and dropped"):
        run(rows(row(14), row(12)), overlong="drop")
    with pytest.raises(UserError, match="there are no rows in the data"):
        run([])
