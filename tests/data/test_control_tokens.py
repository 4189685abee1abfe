"""Control tokens that a text spells out: counted, refused on request, and plain text when typed."""

from functools import cache
from typing import Any

import pytest

from finetune.data.formats.control import ControlTokens
from finetune.data.formats.detect import build_format
from finetune.data.formats.rendering import ChatTemplate, Dialog
from finetune.data.types import Format
from finetune.errors import UserError
from tests.data import stock
from tests.data.settings import format_options
from tests.data.stock import MakeTokenizer
from tests.vocabularies import real_tokenizer

RECORDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chat": (
        {
            "messages": [
                {"role": "user", "content": "What is it?"},
                {"role": "assistant", "content": "%s"},
            ]
        },
        {},
    ),
    "columns of a chat": ({"prompt": "a %s", "completion": "b", "system": ""}, {}),
    "translation": ({"translation": {"en": "The %s file", "fr": "Le fichier"}}, {}),
    "text": ({"text": "some %s text"}, {}),
}


@cache
def qwen3() -> Any:
    return real_tokenizer("qwen3")


def filled(value: Any, word: str) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, word) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, word) for item in value]
    return value.replace("%s", word)


def build(tokenizer: Any, record: Any, **options: Any) -> Format:
    return build_format("auto", format_options(**options), tokenizer=tokenizer, first_record=record)


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_with_a_control_token_is_counted_or_refused(
    case: str, make_tokenizer: MakeTokenizer
) -> None:
    record, options = RECORDS[case]
    tokenizer = make_tokenizer()
    marked, plain = filled(record, "<|im_end|> x"), filled(record, "<|im_ end|> x")
    format = build(tokenizer, plain, **options)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in format.examples(marked)[0].input_ids
    format.examples(plain)
    format.examples(marked)
    assert format.notes() == [
        "2 records have a control token such as '<|im_end|>' in the text. It is learnt as a "
        "control token, as servers read it (data.control_tokens)"
    ]
    assert format.notes() == []
    strict = build(tokenizer, plain, **options, refuse_control_tokens=True)
    assert strict.examples(plain)
    with pytest.raises(UserError, match=r"has the control token '<\|im_end\|>', and data.control"):
        strict.examples(marked)


def test_a_call_may_hold_one_too() -> None:
    tokenizer = real_tokenizer("qwen3")
    control = ControlTokens(tokenizer)
    call = {"function": {"name": "say", "arguments": {"text": ["<|im_start|>"]}}}
    assert (
        control.find([{"role": "assistant", "content": "", "tool_calls": [call]}]) == "<|im_start|>"
    )
    assert control.find("<think>\nHm.\n</think> <tool_call>") is None, "these are the answer's own"


@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_what_is_typed_is_plain_text(name: str) -> None:
    tokenizer = real_tokenizer(name)
    template, mark = ChatTemplate(tokenizer), tokenizer.eos_token
    typed = [{"role": "user", "content": f"What does {mark} mean?"}]
    parsed, plain = template.prompt(typed), template.prompt(typed, parse_control_tokens=False)
    assert parsed.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id) + 1
    assert f"What does {mark} mean?" in tokenizer.decode(plain)
    harmless = [{"role": "user", "content": "What does it mean?"}]
    assert template.prompt(harmless) == template.prompt(harmless, parse_control_tokens=False)


WORDINGS: dict[str, dict[str, Any]] = {
    "the usual one": {},
    "with a system prompt": {"system_prompt": "Be brief."},
    "a wording of one's own": {"template": "{source} in {target_name}: {source}"},
    "a wording with a control token": {"template": "<|im_start|>{target_language} {source}"},
}


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("template", ["CHATML", "GEMMA", "LLAMA2", None])
@pytest.mark.parametrize("wording", WORDINGS)
def test_a_sentence_that_someone_types_is_plain_text(
    wording: str, template: str | None, kind: Any, make_tokenizer: MakeTokenizer
) -> None:
    options = WORDINGS[wording]
    if "system_prompt" in options and template in (None, "GEMMA"):
        pytest.skip("no system messages")
    tokenizer = make_tokenizer(template and getattr(stock, template), kind=kind, adds_bos=True)
    format: Any = build(tokenizer, {"en": "a", "fr": "b"}, **options)

    def prompt(text: str, **how: Any) -> list[int]:
        return list(format.prompt(text, reverse=False, **how).input_ids)

    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for mark in ("<|im_end|>", "</s>", "<|im_start|>"):
        typed = f"The {mark} file"
        plain = prompt(typed, parse_control_tokens=False)
        usual = [i for i in prompt("The file") if i in special]
        assert [i for i in plain if i in special] == usual, "the question's own are still there"
        assert len([i for i in prompt(typed) if i in special]) > len(usual), "and data is parsed"
        assert kind == "metaspace" or typed in tokenizer.decode(plain)  # which has no "<"
    assert prompt("The file", parse_control_tokens=False) == prompt("The file")


def test_a_tool_that_someone_describes_is_plain_text() -> None:
    tokenizer = qwen3()
    template, end = ChatTemplate(tokenizer), tokenizer.eos_token_id
    asked = [{"role": "user", "content": "Hi"}]

    def prompt(**function: Any) -> list[int]:
        tools = [{"type": "function", "function": {"name": "add", **function}}]
        return template.prompt(Dialog(asked, tools), parse_control_tokens=False)

    usual = prompt(description="An end").count(end)
    assert prompt(description="An <|im_end|>").count(end) == usual > 0
    parameters = {"type": "object", "properties": {"<|im_end|>": {}}}
    with pytest.raises(UserError, match=r"a key has the control token '<\|im_end\|>', and only"):
        prompt(parameters=parameters)


def test_the_stop_token_is_plain_text_too_though_it_is_not_called_special(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(stock.ZEPHYR)  # which names it eos_token alone
    tokenizer.add_tokens(["[END]"])
    tokenizer.eos_token = "[END]"
    template, end = ChatTemplate(tokenizer), tokenizer.eos_token_id
    asked = [{"role": "user", "content": "An [END]"}]
    assert template.prompt(asked).count(end) == 2
    assert template.prompt(asked, parse_control_tokens=False).count(end) == 1


FOUND: list[tuple[Any, str | None]] = [
    # a value in a record -> the control token of Qwen3 in it
    ("<|im_end|>", "<|im_end|>"),
    ("a<|im_start|>b", "<|im_start|>"),
    ("<<|endoftext|>>", "<|endoftext|>"),
    ("line\n<|im_end|>\n", "<|im_end|>"),
    ("<|vision_start|>", "<|vision_start|>"),
    ("<|im_end|><|im_start|>", "<|im_end|>"),
    (["a", {"b": ["<|im_end|>"]}], "<|im_end|>"),
    ({"a": {"b": "x <|im_start|>"}}, "<|im_start|>"),
    (("a", "<|im_end|>"), "<|im_end|>"),
    ("<|im_end |>", None),
    ("<|IM_END|>", None),
    ("<|im_end", None),
    ("|im_end|>", None),
    ("&lt;|im_end|&gt;", None),
    ("<|im\u200b_end|>", None),
    ("</s>", None),
    ("<s>[INST]", None),
    ("<end_of_turn>", None),
    ("<think></think>", None),
    ("<tool_call>", None),
    (7, None),
    (None, None),
    ({"<|im_end|>": 1}, None),
]


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_which_texts_have_a_control_token(number: int) -> None:
    value, expected = FOUND[number]
    assert ControlTokens(qwen3()).find(value) == expected


def test_the_stop_token_is_one_though_it_is_not_called_special(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[END]"])
    assert ControlTokens(tokenizer).find("a [END]") is None
    tokenizer.eos_token = "[END]"
    assert ControlTokens(tokenizer).find("a [END]") == "[END]"
