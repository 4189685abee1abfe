"""`data.merge_turns`: turns of one role in a row become one, and nothing that is said is lost."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.formats.detect import build_format
from finetune.data.formats.messages import merge_turns
from finetune.errors import UserError
from tests.data.settings import format_options
from tests.data.stock import MakeTokenizer

TURNS = [
    {"role": "user", "content": "Hello?"},
    {"role": "user", "content": "Is anyone there?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "assistant", "content": "How can I help?"},
]


def test_turns_of_one_role_are_joined_by_a_blank_line(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    record = {"messages": TURNS}
    options = format_options(merge_turns=True)
    format = build_format("auto", options, tokenizer=tokenizer, first_record=record)
    [example] = format.examples(record)
    assert tokenizer.decode(list(example.input_ids)) == (
        "<|im_start|>user\nHello?\n\nIs anyone there?<|im_end|>\n"
        "<|im_start|>assistant\nYes.\n\nHow can I help?<|im_end|>"
    )
    refusing = build_format("auto", format_options(), tokenizer=tokenizer, first_record=record)
    with pytest.raises(UserError, match=r"message 2 is from user .* Set data\.merge_turns=true to"):
        refusing.examples(record)
    apart = [{**turn, "name": str(number)} for number, turn in enumerate(TURNS)]
    with pytest.raises(UserError, match=r"and a tool answers a call$"):
        format.examples({"messages": apart})


APART: list[list[dict[str, Any]]] = [
    [{"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}],
    [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{}]},
    ],
    [
        {"role": "assistant", "content": "a", "reasoning_content": "x"},
        {"role": "assistant", "content": "b"},
    ],
]


@pytest.mark.parametrize("messages", APART)
def test_turns_that_say_more_than_text_stay_apart(messages: list[dict[str, Any]]) -> None:
    assert merge_turns(messages, set()) == (messages, set())


def test_an_answer_that_is_not_learnt_is_not_joined_to_one_that_is() -> None:
    answers = [{"role": "assistant", "content": text} for text in "abcd"]
    joined = [{"role": "assistant", "content": text} for text in ("a\n\nb", "c\n\nd")]
    assert merge_turns(answers, {0, 1}) == (joined, {0})
    assert merge_turns(answers, {2, 3}) == (joined, {1})


ROLES = st.sampled_from(["system", "user", "assistant"])


@given(st.lists(st.tuples(ROLES, st.text(max_size=3), st.booleans()), max_size=8))
def test_nothing_is_lost(turns: list[tuple[str, str, bool]]) -> None:
    messages = [{"role": role, "content": text} for role, text, _ in turns]
    muted = {place for place, (*_, is_muted) in enumerate(turns) if is_muted}
    merged, places = merge_turns(messages, muted)
    marks = [(message["role"], place in places) for place, message in enumerate(merged)]
    assert all(first != second for first, second in pairwise(marks))
    said = [(role, is_muted, text) for role, text, is_muted in turns if text.strip()]
    written = list(zip(marks, (message["content"] for message in merged)))
    for role, is_muted, text in said:
        while written[0][0] != (role, is_muted) or text not in written[0][1]:
            written.pop(0)
    assert sum(len(text) for *_, text in said) <= sum(len(m["content"]) for m in merged)


def test_there_was_something_to_check() -> None:
    assert (len(TURNS), len(APART)) == (4, 3)
