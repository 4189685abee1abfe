"""Calls in answers: read, and compared with those of the data."""

from typing import Any

import pytest

from finetune.data.types import Prompt
from finetune.evaluation.answers import evaluate_generation
from finetune.evaluation.tool_calls import (
    call_scores,
    judge_calls,
    read_answer_calls,
    text_beside_calls,
)
from tests.evaluation.test_evaluation import GREEDY
from tests.vocabularies import real_tokenizer

CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
READ: dict[str, tuple[str, list[dict[str, Any]] | None]] = {
    "one": (WRITTEN, [CALL]),
    "after thoughts and text": (f"<think>\nHm.\n</think>\n\nI look.\n{WRITTEN}", [CALL]),
    "two": (f"{WRITTEN}\n{WRITTEN}", [CALL, CALL]),
    "without arguments": (
        '<tool_call>{"name": "now"}</tool_call>',
        [{"name": "now", "arguments": {}}],
    ),
    "none": ("It is 5 degrees.", None),
    "not closed": (WRITTEN.removesuffix("</tool_call>"), None),
    "no JSON": ("<tool_call>weather(Oslo)</tool_call>", None),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', None),
    "deep": ("<tool_call>" + "[" * 9999 + "</tool_call>", None),
    "a list": ("<tool_call>[1]</tool_call>", None),
    "not a number": ('<tool_call>{"name": "f", "arguments": {"a": [NaN]}}</tool_call>', None),
    "infinite": ('<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', None),
    "half a character": ('<tool_call>{"name": "f\\ud800", "arguments": {}}</tool_call>', None),
    "one of two is broken": (f"{WRITTEN}<tool_call>{{</tool_call>", None),
}


@pytest.mark.parametrize("case", READ)
def test_calls_are_read_from_an_answer(case: str, tokenizer: Any) -> None:
    text, expected = READ[case]
    assert read_answer_calls(tokenizer, tokenizer(text)["input_ids"], prompt=[1]) == expected


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        (WRITTEN, None, ""),
        (f"Let me look.\n{WRITTEN}", None, "Let me look."),
        (f"<|im_start|> I look. {WRITTEN} Then {WRITTEN}.<|im_end|>", None, "I look.  Then ."),
        (f"{WRITTEN}\nDone.", None, "Done."),
        (f"{WRITTEN}<tool_call>\n{{", None, "<tool_call>\n{"),
        (f"a {WRITTEN} b c", len(f"a {WRITTEN} b"), "a  b"),
        (f"a {WRITTEN} b", len("a <tool_call>"), "a"),
        (f"a {WRITTEN} b", 1, "a"),
    ],
)
def test_what_is_said_beside_calls_is_read(
    text: str, length: int | None, expected: str, tokenizer: Any
) -> None:
    ids = tokenizer(text)["input_ids"]
    assert text_beside_calls(tokenizer, ids, prompt=[1], length=length) == expected


def test_a_tokenizer_may_know_the_form_of_its_calls(tokenizer: Any, monkeypatch: Any) -> None:
    """The response templates of transformers."""
    schema = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open": "CALL ",
                "close": " END",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {},
        },
    }
    monkeypatch.setattr(tokenizer, "response_template", schema, raising=False)
    text = 'I look. CALL {"name": "weather", "arguments": {"city": "Oslo"}} END'
    ids = tokenizer(text)["input_ids"]
    assert read_answer_calls(tokenizer, ids, prompt=[]) == [CALL]
    assert text_beside_calls(tokenizer, ids, prompt=[]) == "I look."
    assert read_answer_calls(tokenizer, tokenizer(WRITTEN)["input_ids"], prompt=[]) is None


def test_names_arguments_and_order_count(tokenizer: Any) -> None:
    prompt = Prompt([1], "Weather?", WRITTEN, (CALL,))
    answers = (WRITTEN, f"{WRITTEN}{WRITTEN}", WRITTEN.replace("Oslo", "Rome"), "5 degrees")
    judged = [judge_calls(tokenizer, prompt, tokenizer(text)["input_ids"]) for text in answers]
    assert judged == [(True, True), (True, False), (True, False), (False, False)]
    assert call_scores(judged) == {"tool_calls_parsed": 0.75, "tool_calls_equal": 0.25}
    assert call_scores([]) == {}


@pytest.mark.parametrize(
    ("arguments", "equal"),
    [
        ('{"on": true, "at": [0, {"n": 5}]}', True),
        ('{"at": [0, {"n": 5.0}], "on": true}', True),
        ('{"on": 1, "at": [0, {"n": 5}]}', False),
        ('{"on": true, "at": [false, {"n": 5}]}', False),
        ('{"on": true, "at": [0, {"n": "5"}]}', False),
        ('{"on": true, "at": [0, {"n": 5}, 6]}', False),
        ('{"on": true, "at": [0, {"n": 5}], "off": null}', False),
    ],
)
def test_arguments_are_compared_as_values_of_json(
    arguments: str, equal: bool, tokenizer: Any
) -> None:
    call = {"name": "lamp", "arguments": {"on": True, "at": [0, {"n": 5}]}}
    text = f'<tool_call>{{"name": "lamp", "arguments": {arguments}}}</tool_call>'
    prompt = Prompt([1], "Light?", "", (call,))
    assert judge_calls(tokenizer, prompt, tokenizer(text)["input_ids"]) == (True, equal)


def test_only_answers_that_should_call_are_judged(llama: Any, tokenizer: Any) -> None:
    ids = tokenizer("Where is the café?")["input_ids"]
    prompts = [Prompt(ids, "a", WRITTEN, (CALL,)), Prompt(ids, "b", "x")]
    scores, answers = evaluate_generation(
        llama, tokenizer, prompts, metrics=["tool_calls"], batch_size=2, settings=GREEDY
    )
    assert scores == {"tool_calls_parsed": 0.0, "tool_calls_equal": 0.0}
    assert [answer.keys() for answer in answers] == [
        {"prompt", "reference", "output", "language", "cut"}
    ] * 2
    without = evaluate_generation(
        llama, tokenizer, prompts[1:], metrics=["tool_calls"], batch_size=2, settings=GREEDY
    )
    assert without[0] == {}


def test_qwen3_writes_what_is_read() -> None:
    tokenizer = real_tokenizer("qwen3")
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL}],
        },
    ]
    answer = tokenizer.apply_chat_template(messages, return_dict=False)
    assert read_answer_calls(tokenizer, answer, prompt=[]) == [CALL]
