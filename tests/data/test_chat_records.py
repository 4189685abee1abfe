"""What a chat record also says: learnt as Qwen3's template writes it, or refused."""

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
from tests.vocabularies import real_tokenizer

Case = dict[str, Any]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WRITTEN_CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
)
NO_THOUGHT, END = "<think>\n\n</think>\n\n", "<|im_end|>"


def user(text: str = "2+2?", **more: Any) -> Case:
    return {"role": "user", "content": text, **more}


def answer(text: str | None = "4", **more: Any) -> Case:
    return {"role": "assistant", "content": text, **more}


def chat(*messages: Case, **columns: Any) -> Case:
    return {"messages": list(messages), **columns}


THOUGHT = "<think>\nTwo and two make four.\n</think>\n\n4<|im_end|>"
TOOL_TURNS = [
    user("Weather in Oslo?"),
    answer(None, tool_calls=[CALL]),
    {"role": "tool", "content": "5C"},
    answer("5 degrees."),
]

LEARNT: dict[str, tuple[Case, list[str], list[str]]] = {
    # record -> what is learnt of it, and what else is in its text
    "reasoning_content": (
        chat(user(), answer(reasoning_content="Two and two make four.")),
        [THOUGHT],
        [],
    ),
    "thinking": (chat(user(), answer(thinking="Two and two make four.")), [THOUGHT], []),
    "reasoning": (chat(user(), answer(reasoning="Two and two make four.")), [THOUGHT], []),
    "content and a call": (
        chat(user("Weather?"), answer("I look it up.", tool_calls=[CALL]), tools=[WEATHER]),
        [NO_THOUGHT + "I look it up.\n" + WRITTEN_CALL],
        ["# Tools", '"Weather of a city"'],
    ),
    "tools as text": (
        chat(user("Hi"), answer("Hello"), tools=json.dumps([WEATHER])),
        [NO_THOUGHT + "Hello" + END],
        ["# Tools", '"Weather of a city"'],
    ),
    "a call, its answer, and an answer": (
        chat(*TOOL_TURNS, tools=[WEATHER]),
        [NO_THOUGHT + WRITTEN_CALL, NO_THOUGHT + "5 degrees." + END],
        ["<tool_response>\n5C\n</tool_response>"],
    ),
    "arguments as text": (
        chat(
            user("Weather?"),
            answer(
                "", tool_calls=[{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
            ),
        ),
        [NO_THOUGHT + WRITTEN_CALL],
        [],
    ),
    "a null in the arguments": (
        chat(
            user("Weather?"),
            answer(
                "", tool_calls=[{"name": "weather", "arguments": {"city": "Oslo", "day": None}}]
            ),
        ),
        [NO_THOUGHT + WRITTEN_CALL.replace('"Oslo"', '"Oslo", "day": null')],
        [],
    ),
    "LangChain's args": (
        chat(
            user("Weather?"),
            answer(
                "",
                tool_calls=[
                    {"name": "weather", "args": {"city": "Oslo"}, "id": "1", "type": "tool_call"}
                ],
            ),
        ),
        [NO_THOUGHT + WRITTEN_CALL],
        [],
    ),
    "the old function_call": (
        chat(
            user("W?"),
            answer(None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}),
        ),
        [NO_THOUGHT + WRITTEN_CALL],
        [],
    ),
    "ShareGPT's function_call and observation": (
        {
            "conversations": [
                {"from": "human", "value": "W?"},
                {
                    "from": "function_call",
                    "value": '{"name": "weather", "arguments": {"city": "Oslo"}}',
                },
                {"from": "observation", "value": "5C"},
                {"from": "gpt", "value": "5 degrees."},
            ]
        },
        [NO_THOUGHT + WRITTEN_CALL, NO_THOUGHT + "5 degrees." + END],
        ["<tool_response>\n5C\n</tool_response>"],
    ),
    "a column system": (
        {
            "system": "Answer like a pirate.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Arr!"}],
        },
        [NO_THOUGHT + "Arr!" + END],
        ["<|im_start|>system\nAnswer like a pirate.<|im_end|>"],
    ),
    "columns system and history": (
        {
            "instruction": "And 3+3?",
            "input": "",
            "output": "6",
            "system": "Be terse.",
            "history": [["2+2?", "4"]],
        },
        ["4" + END + NO_THOUGHT + "6" + END, NO_THOUGHT + "4" + END],
        ["system\nBe terse.<", "user\n2+2?<"],
    ),
    "system with prompt and completion": (
        {"system": "Be terse.", "prompt": "3+3?", "completion": "6"},
        [NO_THOUGHT + "6" + END],
        ["system\nBe terse.<"],
    ),
    "a column system_prompt": (
        {"System Prompt": "Be terse.", "question": "3+3?", "response": "6"},
        [NO_THOUGHT + "6" + END],
        ["system\nBe terse.<"],
    ),
    "a column system_prompt beside messages": (
        chat(user(), answer(), system_prompt="Be terse."),
        [NO_THOUGHT + "4" + END],
        ["system\nBe terse.<"],
    ),
    "functions, the old tools": (
        chat(user("Hi"), answer("Hello"), functions=[WEATHER]),
        [NO_THOUGHT + "Hello" + END],
        ["# Tools", '"Weather of a city"'],
    ),
    "a thought": (chat(user(), answer(thought="Two and two make four.")), [THOUGHT], []),
    "KTO's good answer": (
        {"prompt": "2+2?", "completion": "4", "label": True},
        [NO_THOUGHT + "4" + END],
        [],
    ),
    "a record of weight 1": (
        {"question": "2+2?", "answer": "4", "weight": "1"},
        [NO_THOUGHT + "4" + END],
        [],
    ),
    "a turn of loss_weight 0": (
        chat(user(), answer("5", loss_weight=0.0), user("wrong"), answer("4", loss_weight=1.0)),
        [NO_THOUGHT + "4" + END],
        ["assistant\n5<"],
    ),
    "a turn of weight 0": (
        chat(user(), answer("5", weight=0), user("wrong"), answer("4", weight=1)),
        [NO_THOUGHT + "4" + END],
        ["assistant\n5<", "user\nwrong<"],
    ),
    "a turn with train: false": (
        chat(user(), answer("5", train=False), user("wrong"), answer("4", train=True)),
        [NO_THOUGHT + "4" + END],
        ["assistant\n5<"],
    ),
    "thinking switched off": (
        chat(user(), answer(), chat_template_kwargs={"enable_thinking": False}),
        ["4" + END],
        ["assistant\n<think>\n\n</think>\n\n4<"],
    ),
    "a developer": (
        chat({"role": "developer", "content": "terse"}, user(), answer()),
        [NO_THOUGHT + "4" + END],
        ["system\nterse<"],
    ),
    "capitals": (
        chat({"role": "User", "content": "2+2?"}, {"role": "Assistant", "content": "4"}),
        [NO_THOUGHT + "4" + END],
        ["user\n2+2?<"],
    ),
    "parts of text": (
        chat(
            {
                "role": "user",
                "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "d"}]},
        ),
        [NO_THOUGHT + "d" + END],
        ["user\nc?<"],
    ),
    "nulls of other records": (
        chat(
            user(weight=None, name=None),
            answer(tool_calls=None, reasoning_content=None),
            tools=None,
        ),
        [NO_THOUGHT + "4" + END],
        [],
    ),
    "a tool that answers in JSON": (
        chat(*TOOL_TURNS[:2], {"role": "tool", "content": {"temp": 5}}, TOOL_TURNS[3]),
        [NO_THOUGHT + WRITTEN_CALL, NO_THOUGHT + "5 degrees." + END],
        ['<tool_response>\n{"temp": 5}\n</tool_response>'],
    ),
}


@pytest.fixture(scope="module")
def qwen3() -> Any:
    tokenizer = real_tokenizer("qwen3")
    set_template(tokenizer)
    return tokenizer


def detected(tokenizer: Any, record: Case, **options: Any) -> ChatFormat:
    format = build_format(
        "auto", format_options(**options), tokenizer=tokenizer, first_record=record
    )
    assert isinstance(format, ChatFormat)
    return format


def learnt(format: ChatFormat, record: Case) -> tuple[list[str], list[str]]:
    """Return what is learnt of each example, and the whole text of each."""
    decode, examples = format.template.tokenizer.decode, format.examples(record)
    targets = [[label for label in e.labels if label != IGNORE_INDEX] for e in examples]
    return list(map(decode, targets)), [decode(list(e.input_ids)) for e in examples]


@pytest.mark.parametrize("case", LEARNT)
def test_what_a_record_says_is_learnt(case: str, qwen3: Any) -> None:
    record, expected, beside = LEARNT[case]
    format = detected(qwen3, record)
    targets, texts = learnt(format, record)
    if case == "columns system and history":  # Qwen3 writes the first answer otherwise
        expected = [NO_THOUGHT + "4" + END, NO_THOUGHT + "6" + END]
    assert targets == expected
    assert [text for text in beside if text not in texts[-1]] == []
    in_use = ["not used: the records' 'enable_thinking' in chat and generate, which take "
              "data.chat_template_kwargs (1 record)"]  # fmt: skip
    assert format.notes() == (in_use if "chat_template_kwargs" in record else [])


def with_call(**call: Any) -> Case:
    return chat(user("Weather?"), answer("", tool_calls=[call]))


REFUSED: dict[str, tuple[Case, str]] = {
    "a weight between": (
        chat(user(), answer(weight=0.5)),
        "weight of message 2 must be 0 or 1 (false or true), not 0.5",
    ),
    "nothing to learn": (chat(user(), answer(weight=0)), "no answer of the conversation is to be"),
    "a user's turn to learn": (
        chat(user(train=True), answer()),
        "message 1 (user) has train: True, but only answers can be learnt",
    ),
    "switches that differ": (
        chat(user(), answer(train=True, weight=0)),
        "message 2 has weight and train, which differ",
    ),
    "another switch": (
        chat(user(), answer(prefix=True)),
        "does not write 'prefix' of message 2 (assistant), so it would not be learnt",
    ),
    "a structure": (chat(user(), answer(audio={"id": "a"})), "does not write 'audio' of message 2"),
    "an option that does nothing": (
        chat(user(), answer(), chat_template_kwargs={"enable_thinkin": False}),
        "does not use 'enable_thinkin' of chat_template_kwargs",
    ),
    "an image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, answer()),
        "message 1 has a part of the content that is not text alone",
    ),
    "two systems": (
        chat({"role": "system", "content": "a"}, user(), answer(), system="b"),
        "a column and a message with a system prompt",
    ),
    "KTO's bad answer": (
        {"prompt": "2+2?", "completion": "5", "label": False},
        "the column 'label' is False, so the answer is not to be learnt",
    ),
    "a bad answer in a table": (
        {"prompt": "2+2?", "completion": "5", "Label": "False"},
        "the column 'Label' is 'False', so the answer is not to be learnt",
    ),
    "a bad answer in a table of capitals": (
        {"Prompt": "2+2?", "Completion": "5", "Label": "FALSE"},
        "the column 'Label' is 'FALSE', so the answer is not to be learnt",
    ),
    "half a character in JSON within JSON": (
        {
            "messages": '[{"role": "user", "content": "Hi \\ud83d"}, '
            '{"role": "assistant", "content": "b"}]'
        },
        "the text has \\ud83d, half of a surrogate pair, which is no character",
    ),
    "half a character in a call": (
        with_call(name="weather", arguments='{"city": "\\ud83d"}'),
        "the text has \\ud83d, half of a surrogate pair",
    ),
    "a record of weight 0": (
        chat(user(), answer(), weight=0),
        "the column 'weight' is 0, so the answer is not to be learnt",
    ),
    "images": (
        chat(user("<image>What is it?"), answer("A cat."), images=["cat.jpg"]),
        "the column 'images' holds what a model of text cannot read",
    ),
    "a history of texts": (
        {"instruction": "a", "output": "b", "history": ["c", "d"]},
        "history must be a list of pairs of question and answer",
    ),
    "arguments that are no JSON": (
        with_call(name="weather", arguments="{city"),
        "arguments of call 1 of message 2 must be JSON",
    ),
    "arguments that are a list": (
        with_call(name="weather", arguments=["Oslo"]),
        "arguments of call 1 of message 2 must be an object",
    ),
    "a call without a name": (with_call(arguments={}), "call 1 of message 2 must be like {name"),
    "a call that says more": (
        with_call(name="weather", argument={"city": "Oslo"}),
        "call 1 of message 2 has 'argument', and a call has a name and arguments. Rename it, or",
    ),
    "more around a call": (
        with_call(id="call_1", name="other", function={"name": "weather", "arguments": {}}),
        "call 1 of message 2 has 'name' beside function, where id, type and index may be",
    ),
    "arguments that differ": (
        with_call(name="weather", arguments={"city": "Oslo"}, parameters={"city": "Rome"}),
        "call 1 of message 2 has arguments and parameters, which differ. Keep one of them",
    ),
    "tools that are no list": (
        chat(user(), answer(), tools="weather"),
        "the column of tools must be",
    ),
    "a tool without a call": (
        chat(user(), {"role": "tool", "content": "5C"}, answer()),
        "message 2 is from tool after user, but must be from assistant",
    ),
    "a call without its answer": (
        chat(*TOOL_TURNS[:2], user("And?"), answer("x")),
        "message 3 is from user after assistant, but must be from tool",
    ),
    "content and value that differ": (
        chat(user(), {"role": "assistant", "content": "a", "value": "b"}),
        "message 2 has content and value, which differ",
    ),
    "tool_calls and function_call that differ": (
        chat(user(), answer("", function_call={"name": "news"}, tool_calls=[CALL])),
        "message 2 has tool_calls and function_call, which differ. Keep one of them",
    ),
    "a call as content beside another": (
        chat(user(), {"from": "function_call", "value": '{"name": "news"}', "tool_calls": [CALL]}),
        "message 2 has tool_calls and content, which differ",
    ),
    "content null without a call": (chat(user(), answer(None)), "must be text, not None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_is_refused(case: str, qwen3: Any) -> None:
    record, expected = REFUSED[case]
    with pytest.raises(UserError) as caught:
        detected(qwen3, record).examples(record)
    assert expected in str(caught.value)


LEFT_OUT: dict[str, tuple[Case, str]] = {
    "thoughts": (
        chat(user(), answer(reasoning_content="Hm.")),
        "does not write 'reasoning_content'",
    ),
    "calls": (
        chat(user(), answer("Wait.", tool_calls=[CALL])),
        "does not write 'tool_calls' of message 2 (assistant)",
    ),
    "tools": (chat(user(), answer(), tools=[WEATHER]), "does not write tools"),
    "options": (
        chat(user(), answer(), chat_template_kwargs={"enable_thinking": False}),
        "does not use 'enable_thinking'",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_template_leaves_out_is_refused(case: str, make_tokenizer: MakeTokenizer) -> None:
    record, expected = LEFT_OUT[case]
    with pytest.raises(UserError) as caught:
        detected(make_tokenizer(), record).examples(record)
    assert expected in str(caught.value)


def test_a_role_that_a_template_leaves_out_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(
        stock.CHATML.replace("messages %}", "messages if m.role != 'system' %}")
    )
    record = chat({"role": "system", "content": "Be brief."}, user(), answer())
    with pytest.raises(UserError, match="leaves out messages of the role system"):
        detected(tokenizer, record).examples(record)


def test_thoughts_in_the_content_that_a_template_drops_are_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(stock.THOUGHTS_DROPPED)
    record = chat(user(), answer("<think>\nTwo and two.\n</think>\n\n4"))
    with pytest.raises(UserError, match="leaves out the thoughts of an answer, 'Two and two"):
        detected(tokenizer, record).examples(record)
    assert learnt(detected(tokenizer, record), chat(user(), answer()))[0] == ["4" + END]


CUT = {  # what a template does with the text -> who of a question and an answer is named
    "m['content'][:5]": ("assistant", "user"),
    "m['content'] | upper": ("assistant", "user"),
    "m['content'] if m['role'] == 'user' else m['content'][:5]": ("assistant", "assistant"),
    "m['contnt'] if m['role'] == 'user' else m['content']": ("user", "user"),
}


@pytest.mark.parametrize("targets", ["assistant", "all"])
@pytest.mark.parametrize("said", CUT)
@pytest.mark.parametrize("turns", [1, 2])
def test_a_template_that_does_not_write_a_text_as_it_is_is_refused(
    said: str, targets: str, turns: int, make_tokenizer: MakeTokenizer
) -> None:
    """Also if other records are short enough to come through whole."""
    tokenizer = make_tokenizer(stock.CHATML.replace("m['content']", said))
    format = detected(tokenizer, chat(*[user(), answer()] * turns), targets=targets)
    long = chat(*[user("What is 2+2?"), answer("  It is 4, of course. ")] * turns)
    named = CUT[said][targets == "all"]
    with pytest.raises(UserError, match=f"does not write the {named}'s text as it is, '(It|What)"):
        format.examples(long)


def test_a_switch_may_be_taken_out_of_a_question(make_tokenizer: MakeTokenizer) -> None:
    said = "m['content'].replace('/no_think', '')"
    tokenizer = make_tokenizer(stock.CHATML.replace("m['content']", said))
    record = chat(user("What is 2+2? /no_think"), answer("4"))
    for targets in ("assistant", "all"):
        assert detected(tokenizer, record, targets=targets).examples(record)


def test_white_space_around_a_text_may_be_left_out(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(stock.CHATML.replace("m['content']", "m['content'] | trim"))
    record = chat(user(" 2+2?\n"), answer(" 4 "))
    assert learnt(detected(tokenizer, record), record)[0] == ["4" + END]


def test_columns_and_keys_that_are_not_used_are_noted(qwen3: Any) -> None:
    record = chat(user(name="Bob"), answer(id=3), user("Bye"), source="web", empty="", tools=[])
    format = detected(qwen3, record)
    for _ in range(2):
        format.examples(record)
    format.prompts(record)
    assert format.notes() == [
        "not used: 'id' of messages (2 records)",
        "not used: 'name' of messages (2 records)",
        "not used: messages after the last answer (2 records)",
        "not used: the column 'source' (2 records)",
    ]


def test_a_label_that_is_no_verdict_is_noted(qwen3: Any) -> None:
    others = {"label": False, "weight": 0.5, "image": "four.png", "video": {"views": 3}}
    others |= {"functions": ["sin"], "system_message": 7, "train": False}
    record = {"question": "2+2?", "answer": "4", **others}
    format = detected(qwen3, record)
    assert learnt(format, record)[0] == [NO_THOUGHT + "4" + END]
    assert format.notes() == [
        f"not used: the column {name!r} (1 record)" for name in sorted(others)
    ]


def test_columns_of_other_names(qwen3: Any) -> None:
    record = {"q": "2+2?", "a": "4", "rule": "Be terse.", "functions": [WEATHER]}
    columns = {"prompt": "q", "completion": "a", "system": "rule", "tools": "functions"}
    format = detected(qwen3, record, columns=columns)
    _, [text] = learnt(format, record)
    assert "Be terse.\n\n# Tools" in text
    assert format.notes() == []


def test_an_optional_column_of_another_name_may_be_in_later_records_alone(qwen3: Any) -> None:
    columns = {"prompt": "q", "completion": "a", "system": "rule", "history": "before"}
    format = detected(qwen3, {"q": "2+2?", "a": "4"}, columns=columns)
    record = {"q": "3+3?", "a": "6", "rule": "Be terse.", "before": [["2+2?", "4"]]}
    text = learnt(format, record)[1][-1]
    assert "Be terse." in text
    assert "2+2?" in text
    with pytest.raises(UserError, match="before must be a list of pairs"):
        format.examples({**record, "before": ["2+2?"]})


def test_options_of_the_run_are_those_of_every_record(qwen3: Any) -> None:
    record = chat(user(), answer())
    settings = TemplateSettings(options={"enable_thinking": False})
    assert learnt(detected(qwen3, record, settings=settings), record)[0] == ["4" + END]


def test_a_switched_off_turn_is_left_out_of_all_targets(make_tokenizer: MakeTokenizer) -> None:
    record = chat(user("a"), answer("b", weight=0), user("c"), answer("d"))
    format = detected(make_tokenizer(), record, targets="all")
    [targets], [text] = learnt(format, record)
    assert "assistant\nb<|im_end|>" in text
    assert "assistant\n\n<|im_start|>user\nc" in targets


@pytest.mark.parametrize("places", [(0,), (2,)])
def test_a_question_cannot_be_left_out_of_all_targets(
    places: tuple[int, ...], make_tokenizer: MakeTokenizer
) -> None:
    turns = [user("a"), answer("b"), user("c"), answer("d")]
    for place in places:
        turns[place] |= {"train": False}
    record = chat(*turns)
    with pytest.raises(UserError, match=rf"message {places[0] + 1} \(user\) is switched off, but"):
        detected(make_tokenizer(), record, targets="all").examples(record)
    [targets], _ = learnt(detected(make_tokenizer(), record), record)
    assert targets == "b<|im_end|>d<|im_end|>"


def test_a_prompt_shows_the_conversation_and_holds_the_calls_of_the_reference(qwen3: Any) -> None:
    record = chat({"role": "system", "content": "Be brief."}, *TOOL_TURNS[:2], tools=[WEATHER])
    [prompt] = detected(qwen3, record).prompts(record)
    assert prompt.text == (
        f"tools: {json.dumps([WEATHER])}\n\nsystem: Be brief.\n\nuser: Weather in Oslo?"
    )
    assert prompt.reference == (NO_THOUGHT + WRITTEN_CALL.removesuffix(END)).strip()
    assert prompt.tool_calls == ({"name": "weather", "arguments": {"city": "Oslo"}},)


def test_each_call_is_asked_for_and_the_last_answer(qwen3: Any) -> None:
    record = chat(*TOOL_TURNS, tools=[WEATHER])
    call, last = detected(qwen3, record).prompts(record)
    assert [len(prompt.tool_calls) for prompt in (call, last)] == [1, 0]
    assert last.text.endswith(
        'assistant: {"name": "weather", "arguments": {"city": "Oslo"}}\n\ntool: 5C'
    )
    assert last.reference == NO_THOUGHT + "5 degrees."


def test_there_was_something_to_check() -> None:
    assert (len(LEARNT), len(REFUSED), len(LEFT_OUT)) == (29, 30, 4)
