"""Odd records through odd templates: learnt as they say, or refused for the true reason."""

import json
from typing import Any

import pytest

from finetune.data.formats.chat import ChatFormat
from finetune.data.formats.detect import build_format
from finetune.data.formats.rendering import TemplateSettings
from finetune.data.types import IGNORE_INDEX
from finetune.errors import UserError
from finetune.models.tokenizers import set_template
from tests.data import stock
from tests.data.settings import format_options
from tests.data.stock import MakeTokenizer
from tests.data.test_chat_records import (
    CALL,
    END,
    NO_THOUGHT,
    WEATHER,
    answer,
    chat,
    detected,
    learnt,
    user,
)
from tests.vocabularies import real_tokenizer

CITY = {**CALL, "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CALLS = (  # as most templates write calls
    TOOLS
    + stock.CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}{% endfor %}",
    )
)
FIRST_CALL = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
NO_ARGUMENTS = CALLS.replace("{{ c.function.arguments | tojson }}", "")
TEXT_ARGUMENTS = CALLS.replace(
    "{{ c.function.arguments | tojson }}", "{{ '(' + c.function.arguments + ')' }}"
)
ONE_CALL = CALLS.replace(
    "{% for c in",
    "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call at a "
    "time') }}{% endif %}{% for c in",
)
FIRST_TOOL = CALLS.replace("{{ tools | tojson }}", "{{ tools[0] | tojson }}")
THINKS = stock.CHATML.replace(
    "{{ m['content'] }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m['content'] }}",
)
ONLY_THAT_IT_THOUGHT = THINKS.replace("{{ m.reasoning_content }}", "a while")
FIRST_WORD = THINKS.replace("m.reasoning_content }}", "m.reasoning_content.split()[0] }}")
FORGETS = THINKS.replace(
    "{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}"
)
EFFORT = (  # a variable with values of its own
    "{# thrift is no variable #}{% set how = 'hard' if effort == 'high' else 'a bit' %}"
    "<|im_start|>system\nThink {{ how }}.<|im_end|>\n" + stock.CHATML
)
DEEP = (  # a switch, as Qwen3's enable_thinking is
    "{% if deep is defined and deep is false %}<|im_start|>system\nShort.<|im_end|>\n{% endif %}"
    + stock.CHATML
)
NO_END_OF_CALL = CALLS.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% if m.tool_calls %}<think>{% endif %}"
)

two_calls = chat(user("Weather?"), answer("", tool_calls=[CALL, CITY]), tools=[WEATHER])
one_call = chat(user("Weather?"), answer("", tool_calls=[CALL]), tools=[WEATHER])
thought = chat(user(), answer(reasoning_content="Two and two."))
two_thoughts = chat(*thought["messages"], user("Sure?"), answer(reasoning_content="Quite."))

WRITTEN = '<call>weather {"city": "Oslo"}'
LEARNT: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # template, record -> what is learnt
    "a call": (CALLS, one_call, [WRITTEN + END]),
    "two calls": (CALLS, two_calls, [WRITTEN + WRITTEN.replace("Oslo", "Rome") + END]),
    "arguments that the template takes for text": (
        TEXT_ARGUMENTS,
        one_call,
        ['<call>weather ({"city": "Oslo"})' + END],
    ),
    "a call where there may be only one": (ONE_CALL, one_call, [WRITTEN + END]),
    "one tool of one": (FIRST_TOOL, one_call, [WRITTEN + END]),
    "thoughts": (
        THINKS,
        two_thoughts,
        [f"<think>Two and two.</think>4{END}<think>Quite.</think>4{END}"],
    ),
    "thoughts of each turn, though only the last keeps them": (
        FORGETS,
        two_thoughts,
        ["<think>Two and two.</think>4" + END, "<think>Quite.</think>4" + END],
    ),
    "a thought of one word": (
        FIRST_WORD,
        chat(user(), answer(reasoning_content="Four.")),
        ["<think>Four.</think>4" + END],
    ),
    "a switch for which a text does what it says": (
        DEEP,
        chat(user(), answer(), chat_template_kwargs={"deep": "yes"}),
        ["4" + END],
    ),
    "words that are no switch": (
        EFFORT.replace("high", "on"),
        chat(user(), answer(), chat_template_kwargs={"effort": "off"}),
        ["4" + END],
    ),
    "a variable that keeps its default": (
        EFFORT,
        chat(user(), answer(), chat_template_kwargs={"effort": "low"}),
        ["4" + END],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEARNT)
def test_what_a_record_says_is_learnt_through_other_templates(
    case: str, make_tokenizer: MakeTokenizer
) -> None:
    template, record, expected = LEARNT[case]
    tokenizer = make_tokenizer(template)
    set_template(tokenizer)
    assert learnt(detected(tokenizer, record), record)[0] == expected


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # template, record, options -> why it is refused
    "only the first call is written": (FIRST_CALL, two_calls, {}, "does not write the later calls"),
    "arguments are not written": (NO_ARGUMENTS, one_call, {}, "not write the arguments of 'tool_c"),
    "the template allows one call": (
        ONE_CALL,
        two_calls,
        {},
        "fails on this conversation: one cal",
    ),
    "only the first tool is written": (
        FIRST_TOOL,
        {**one_call, "tools": [WEATHER, {**WEATHER, "strict": True}]},
        {},
        "does not write more than one of the tools",
    ),
    "that there are thoughts, but not which": (
        ONLY_THAT_IT_THOUGHT,
        thought,
        {},
        "does not write 'reasoning_content' of message 2",
    ),
    "thoughts in part": (FIRST_WORD, thought, {}, "leaves out the thoughts of an answer, 'Two and"),
    "thoughts of earlier turns, which `all` learns as one text": (
        FORGETS,
        two_thoughts,
        {"targets": "all"},
        "does not write 'reasoning_content' of message 2",
    ),
    "a call that ends in no stop token": (
        NO_END_OF_CALL.replace("<|im_end|>\n", ""),
        one_call,
        {},
        "is not a special token, so a model trained with it would never stop",
    ),
    "a variable that only a comment names": (
        EFFORT,
        chat(user(), answer(), chat_template_kwargs={"thrift": "much"}),
        {},
        "does not use 'thrift' of chat_template_kwargs",
    ),
    "a switch of text": (
        DEEP,
        chat(user(), answer(), chat_template_kwargs={"deep": "False"}),
        {},
        "chat_template_kwargs has deep: 'False', which is no switch for the chat template. Write f",
    ),
    "a switch that is a number": (
        DEEP,
        chat(user(), answer(), chat_template_kwargs={"deep": 0}),
        {},
        "chat_template_kwargs has deep: 0, which is no switch",
    ),
    "tools as a variable": (
        CALLS,
        chat(user(), answer(), chat_template_kwargs={"tools": [WEATHER]}),
        {},
        "chat_template_kwargs has 'tools', which the chat template gets from each record. Leave",
    ),
    "two system prompts that differ": (
        THINKS,
        chat({"role": "system", "content": "a"}, user(), answer(), system="b"),
        {},
        "there are a column and a message with a system prompt",
    ),
    "tools that are no JSON": (CALLS, {**one_call, "tools": "[weather"}, {}, "must be JSON, not"),
    "history that is no list of pairs": (
        THINKS,
        {"instruction": "a", "output": "b", "history": '[{"a": "b"}]'},
        {},
        "history must be a list of pairs",
    ),
    "lists of different lengths": (
        THINKS,
        {"messages": {"role": ["user", "assistant"], "content": ["a"]}},
        {},
        "a conversation is a list of messages",
    ),
    "a conversation as broken JSON": (
        THINKS,
        {"messages": '[{"role": "user"'},
        {},
        "a conversation must be JSON",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_for_the_true_reason(
    case: str, make_tokenizer: MakeTokenizer
) -> None:
    template, record, options, expected = REFUSED[case]
    tokenizer = make_tokenizer(template)
    set_template(tokenizer)
    with pytest.raises(UserError) as caught:
        detected(tokenizer, record, **options).examples(record)
    assert expected in str(caught.value)


def test_a_record_that_fails_does_not_speak_for_the_others(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(ONE_CALL)
    set_template(tokenizer)
    format = detected(tokenizer, two_calls)
    with pytest.raises(UserError, match="one call at a time"):
        format.examples(two_calls)
    assert learnt(format, one_call)[0] == [WRITTEN + END]


OTHER_SHAPES: dict[str, dict[str, Any]] = {
    "messages as a text of JSON, as in a table": {
        "messages": json.dumps([user(), answer()]),
    },
    "conversations as a text of JSON": {
        "conversations": ' [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]'
    },
    "an object with a list for each key, as in Parquet": {
        "messages": {"role": ["user", "assistant"], "content": ["2+2?", "4"]},
    },
    "the same by ShareGPT's names": {
        "conversations": {"from": ("human", "gpt"), "value": ("2+2?", "4")},
    },
    "the same with nulls": {
        "messages": {"role": ["user", "assistant"], "content": ["2+2?", "4"], "name": [None, None]},
    },
    "prompt and completion as messages": {"prompt": [user()], "completion": [answer()]},
    "a completion in parts": {
        "prompt": [user()],
        "completion": [answer([{"type": "text", "text": "4"}])],
    },
    "an empty system prompt in its column": chat(user(), answer(), system=""),
    "null in each optional column": chat(
        user(), answer(), system=None, tools=None, chat_template_kwargs=None, history=None
    ),
    "empty texts in each optional column": chat(
        user(), answer(), tools="", chat_template_kwargs="", history=""
    ),
    "no history in a table": {
        "instruction": "2+2?", "input": "", "output": "4", "history": "[]", "system": "",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen3() -> Any:
    tokenizer = real_tokenizer("qwen3")
    set_template(tokenizer)
    return tokenizer


@pytest.mark.parametrize("case", OTHER_SHAPES)
def test_other_shapes_of_one_conversation(case: str, qwen3: Any) -> None:
    record = OTHER_SHAPES[case]
    format = detected(qwen3, record)
    assert learnt(format, record) == (
        [NO_THOUGHT + "4" + END],
        [f"<|im_start|>user\n2+2?{END}\n<|im_start|>assistant\n{NO_THOUGHT}4{END}"],
    )
    assert format.notes() == []


def test_options_as_a_text_and_those_that_the_config_has_too(qwen3: Any) -> None:
    record = chat(user(), answer(), chat_template_kwargs='{"enable_thinking": false}')
    settings = TemplateSettings(options={"enable_thinking": False})
    format = detected(qwen3, record, settings=settings)
    assert learnt(format, record)[0] == ["4" + END]
    assert format.notes() == []


def test_tools_and_history_as_texts(qwen3: Any) -> None:
    record = {
        "instruction": "And 3+3?",
        "output": "6",
        "history": '[["2+2?", "4"]]',
        "system": "Be terse.",
        "tools": [json.dumps(WEATHER)],
    }
    text = learnt(detected(qwen3, record), record)[1][-1]
    for said in ("Be terse.\n\n# Tools", '"Weather of a city"', "user\n2+2?<", "assistant\n4<"):
        assert said in text


def test_the_same_system_prompt_in_a_column_and_a_message_is_one(qwen3: Any) -> None:
    record = chat({"role": "system", "content": "terse"}, user(), answer(), system="terse")
    assert learnt(detected(qwen3, record), record)[1][0].count("terse") == 1


NOTES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an input beside prompt and completion": (
        {"prompt": "a", "completion": "b", "input": "c"},
        ["not used: the column 'input' (1 record)"],
    ),
    "an input beside messages": (
        chat(user(), answer(), input="c", output="d"),
        ["not used: the column 'input' (1 record)", "not used: the column 'output' (1 record)"],
    ),
    "a score beside a pair": (
        {"en": "a", "fr": "b", "score": "0.98"},
        ["not used: the column 'score' (1 record)"],
    ),
    "a third language": (
        {"translation": {"en": "a", "fr": "b", "de": "c"}},
        ["not used: 'de' of the pairs (1 record)"],
    ),
    "an id beside a pair": (
        {"id": 3, "translation": {"en": "a", "fr": "b"}},
        ["not used: the column 'id' (1 record)"],
    ),
    "a title beside a text": (
        {"text": "a", "title": "b"},
        ["not used: the column 'title' (1 record)"],
    ),
    "null is nothing": ({"text": "a", "title": None, "tags": [], "note": ""}, []),
}


@pytest.mark.parametrize("case", NOTES)
def test_what_is_not_used_of_any_format_is_noted(case: str, make_tokenizer: MakeTokenizer) -> None:
    record, expected = NOTES[case]
    languages = {"source_language": "en", "target_language": "fr"} if "third" in case else {}
    format = build_format(
        "auto", format_options(**languages), tokenizer=make_tokenizer(), first_record=record
    )
    format.examples(record)
    assert format.notes() == expected
    assert format.notes() == []


EN_FR = {"source_language": "en", "target_language": "fr"}
MISPLACED: dict[str, tuple[str | None, dict[str, Any], dict[str, Any], str]] = {
    "a misspelt variable": (
        EFFORT,
        chat(user(), answer()),
        {"settings": TemplateSettings(options={"efort": "high"})},
        "does not use 'efort' of data.chat_template_kwargs",
    ),
    "a misspelt variable of a translation": (
        EFFORT,
        {"en": "a", "fr": "b"},
        {"settings": TemplateSettings(options={"efort": "high"})},
        "does not use 'efort' of data.chat_template_kwargs",
    ),
    "a switch of text": (
        DEEP,
        chat(user(), answer()),
        {"settings": TemplateSettings(options={"deep": "no"})},
        "data.chat_template_kwargs has deep: 'no', which is no switch for the chat template. Write",
    ),
    "messages as a variable": (
        EFFORT,
        chat(user(), answer()),
        {"settings": TemplateSettings(options={"messages": []})},
        "data.chat_template_kwargs has 'messages', which the chat template gets from each record",
    ),
    "a variable of plain text": (
        EFFORT,
        {"text": "a"},
        {"settings": TemplateSettings(options={"effort": "high"})},
        "data.chat_template_kwargs is given, but this data is learnt as plain text",
    ),
    "a system prompt of plain text": (
        EFFORT,
        {"text": "a"},
        {"system_prompt": "Be terse."},
        "data.system_prompt is given, but this data is learnt as plain text",
    ),
    "a system prompt of a translation without a template": (
        None,
        {"en": "a", "fr": "b"},
        {"system_prompt": "Be terse."},
        "data.system_prompt is given, but this data is learnt as plain text",
    ),
    "languages of a conversation": (
        EFFORT,
        chat(user(), answer()),
        {"source_language": "en"},
        "source_language (--from of `finetune init`) is given, but this data is learnt as chat",
    ),
    "a direction of a text": (
        None,
        {"text": "a"},
        {"direction": "both"},
        "data.translation.direction is given, but this data is learnt as text",
    ),
    "a column that is not read": (
        EFFORT,
        {**chat(user(), answer()), "one": "Hello"},
        {"columns": {"source": "one"}},
        "data.columns takes 'source' from the column 'one', but the data is learnt as chat, from "
        "messages",
    ),
    "a text called translation": (
        EFFORT,
        {"word": "Hello", "translation": "Bonjour"},
        EN_FR,
        "set data.columns={source: ..., target: translation}",
    ),
    "a system prompt that the template leaves out": (
        stock.CHATML.replace("messages %}", "messages if m.role != 'system' %}"),
        {"en": "a", "fr": "b"},
        {"system_prompt": "Be terse."},
        "a system prompt is given, but the chat template takes none",
    ),
}


ASKED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # record, options, format, what is learnt
    "a text beside an instruction": (
        {"instruction": "a", "input": "", "output": "b", "formatted": "### a\nb"},
        {"columns": {"text": "formatted"}},
        "text",
        "# a\nb",
    ),
    "sides beside a column translation": (
        {"sentence": "Hello", "translation": "Bonjour"},
        {"columns": {"source": "sentence", "target": "translation"}, **EN_FR},
        "translation",
        "Bonjour",
    ),
    "languages beside messages": (
        {**chat(user(), answer()), "one": "Hello", "two": "Bonjour"},
        {"columns": {"en": "one", "fr": "two"}, **EN_FR},
        "translation",
        "Bonjour",
    ),
    "a question beside messages": (
        {**chat(user(), answer("x")), "question": "q", "gold": "y"},
        {"columns": {"prompt": "question", "completion": "gold"}},
        "chat",
        "y",
    ),
    "a question by its usual name beside messages": (
        {**chat(user(), answer("x")), "q": "q", "answer": "y"},
        {"columns": {"prompt": "q", "completion": "answer"}},
        "chat",
        "y",
    ),
    "nothing, and a remark": (
        {"Question": "Hi?", "Answer": "Hello", "Text": "see p. 3"}, {}, "chat", "Hello"
    ),
    "nothing, and a text called translation": (
        {"question": "a", "answer": "b", "translation": "c"}, {}, "chat", "b"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_the_columns_that_are_named_say_the_format(
    case: str, make_tokenizer: MakeTokenizer
) -> None:
    record, options, kind, expected = ASKED[case]
    tokenizer = make_tokenizer()
    format = build_format(
        "auto", format_options(**options), tokenizer=tokenizer, first_record=record
    )
    [example] = format.examples(record)
    learnt = [label for label in example.labels if label != IGNORE_INDEX]
    assert format.name == kind
    assert expected in tokenizer.decode(learnt)


@pytest.mark.parametrize("case", MISPLACED)
def test_what_a_config_says_and_no_template_writes_is_refused(
    case: str, make_tokenizer: MakeTokenizer
) -> None:
    template, record, options, expected = MISPLACED[case]
    tokenizer = make_tokenizer(template)
    with pytest.raises(UserError) as caught:
        build_format("auto", format_options(**options), tokenizer=tokenizer, first_record=record)
    assert expected in str(caught.value)


def test_a_variable_of_the_config_is_used(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(EFFORT)
    record = chat(user(), answer())
    settings = TemplateSettings(options={"effort": "high"})
    format = detected(tokenizer, record, settings=settings)
    assert isinstance(format, ChatFormat)
    assert "Think hard." in learnt(format, record)[1][0]


def test_there_was_something_to_check() -> None:
    tables = (LEARNT, REFUSED, OTHER_SHAPES, NOTES, MISPLACED, ASKED)
    assert [len(table) for table in tables] == [11, 17, 11, 7, 12, 7]
