"""The system prompt of the use is that of the training: a question in use begins as in training."""

from typing import Any

import pytest

from finetune.data.formats.detect import build_format
from finetune.data.formats.rendering import ChatTemplate
from finetune.models.tokenizers import set_template

from . import stock
from .settings import format_options
from .stock import MakeTokenizer

TERSE = "Be terse."
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
TEMPLATES = {
    "ChatML": stock.CHATML,
    "a default system message": stock.DEFAULT_SYSTEM,  # Qwen2.5, SmolLM2
    "in the first question": stock.LLAMA2,
    "in the last question": stock.SYSTEM_LAST,  # Mistral
    "thoughts": stock.THINKING,
    "end of text": stock.PHI3,
    "no header": stock.NO_HEADER_ASKED,
}
WAYS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str | None]] = {
    # records, options of the config -> the system prompt of all
    "none": ([{"messages": TURNS}] * 2, {}, None),
    "the config's": ([{"messages": TURNS}] * 2, {"system_prompt": TERSE}, TERSE),
    "one in every conversation": (
        [{"messages": [{"role": "system", "content": TERSE}, *TURNS]}] * 2,
        {},
        TERSE,
    ),
    "one in every conversation and the config's": (
        [{"messages": [{"role": "system", "content": TERSE}, *TURNS]}] * 2,
        {"system_prompt": "Be wordy."},
        TERSE,
    ),
    "a developer's": (
        [{"messages": [{"role": "developer", "content": TERSE}, *TURNS]}] * 2,
        {},
        TERSE,
    ),
    "a column": ([{"prompt": "2+2?", "completion": "4", "system": TERSE}] * 2, {}, TERSE),
    "in the prompt": (
        [{"prompt": [{"role": "system", "content": TERSE}, TURNS[0]], "completion": TURNS[1:]}] * 2,
        {},
        TERSE,
    ),
    "ShareGPT's": (
        [
            {
                "system": TERSE,
                "conversations": [
                    {"from": "human", "value": "2+2?"},
                    {"from": "gpt", "value": "4"},
                ],
            }
        ]
        * 2,
        {},
        TERSE,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_question_in_use_begins_as_in_training(
    template: str, way: str, make_tokenizer: MakeTokenizer
) -> None:
    records, options, expected = WAYS[way]
    tokenizer = make_tokenizer(TEMPLATES[template])
    set_template(tokenizer)
    format = build_format(
        "auto", format_options(**options), tokenizer=tokenizer, first_record=records[0]
    )
    examples = [example for record in records for example in format.examples(record)]
    system = format.common_system_prompt
    assert system == expected
    before = [] if system is None else [{"role": "system", "content": system}]
    asked = ChatTemplate(tokenizer).prompt([*before, TURNS[0]])
    for example in examples:
        assert list(example.input_ids[: len(asked)]) == asked
        assert example.labels[len(asked) - 1] == -100
        assert example.labels[len(asked)] == example.input_ids[len(asked)]


def test_an_empty_system_message_is_not_the_templates_own(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(stock.DEFAULT_SYSTEM)
    record = {"messages": [{"role": "system", "content": ""}, *TURNS]}
    format = build_format("auto", format_options(), tokenizer=tokenizer, first_record=record)
    [example] = format.examples(record)
    assert format.common_system_prompt == ""
    asked = ChatTemplate(tokenizer).prompt([record["messages"][0], TURNS[0]])
    assert list(example.input_ids[: len(asked)]) == asked
    assert "helpful" not in tokenizer.decode(asked)


def test_conversations_that_differ_have_the_configs_alone(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    for own in (None, TERSE):
        format = build_format(
            "auto", format_options(system_prompt=own), tokenizer=tokenizer,
            first_record={"messages": TURNS},
        )  # fmt: skip
        for text in ("one", "two"):
            format.examples({"messages": [{"role": "system", "content": text}, *TURNS]})
        assert format.common_system_prompt == own


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_instruction_of_a_translation_is_its_system_prompt(
    direction: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer, record = make_tokenizer(stock.DEFAULT_SYSTEM), {"en": "a", "fr": "b"}
    format = build_format(
        "auto", format_options(direction=direction), tokenizer=tokenizer, first_record=record
    )
    [example] = format.examples(record)
    system = format.common_system_prompt
    assert (
        system
        == {
            "forward": "Translate English to French.",
            "backward": "Translate French to English.",
        }[direction]
    )
    question = {"role": "user", "content": "a" if direction == "forward" else "b"}
    asked = ChatTemplate(tokenizer).prompt([{"role": "system", "content": system}, question])
    assert list(example.input_ids[: len(asked)]) == asked


def test_there_was_something_to_check() -> None:
    assert (len(TEMPLATES), len(WAYS)) == (7, 8)
