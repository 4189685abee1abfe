"""Conversations: what is learnt under stock-like templates, the shapes read, every refusal."""

import json
from typing import Any

import pytest

from finetune.data.formats.chat import ChatFormat
from finetune.data.formats.control import ControlTokens
from finetune.data.formats.detect import build_format
from finetune.data.formats.rendering import TemplateSettings
from finetune.data.types import IGNORE_INDEX, Example
from finetune.errors import UserError
from tests.data import stock
from tests.data.settings import format_options
from tests.data.stock import MakeTokenizer

TURNS = [
    ("user", "What is the capital of France?"),
    ("assistant", "The capital of France is Paris."),
    ("user", "Où est la gare ?"),
    ("assistant", "I am fine, thank you."),
]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
TEMPLATES = {  # template -> what is learnt of the conversation above, run together
    "CHATML": "The capital of France is Paris.<|im_end|>I am fine, thank you.<|im_end|>",
    "DEFAULT_SYSTEM": "The capital of France is Paris.<|im_end|>I am fine, thank you.<|im_end|>",
    "LLAMA2": " The capital of France is Paris. </s> I am fine, thank you. </s>",
    "GEMMA": "The capital of France is Paris.<end_of_turn>I am fine, thank you.<end_of_turn>",
    "ZEPHYR": "The capital of France is Paris.</s>I am fine, thank you.</s>",
    "SYSTEM_LAST": " The capital of France is Paris.</s> I am fine, thank you.</s>",
}


def chat(
    tokenizer: Any,
    *,
    shape: str = "messages",
    columns: Any = None,
    targets: str = "assistant",
    system: str | None = None,
) -> ChatFormat:
    return ChatFormat(
        tokenizer=tokenizer,
        shape=shape,
        columns=columns or {},
        targets=targets,
        system_prompt=system,
        settings=TemplateSettings(),
        control=ControlTokens(tokenizer),
    )


def learnt(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_turns_with_their_end_mark_are_learnt(
    name: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(getattr(stock, name), adds_bos=True)
    record = {"messages": MESSAGES}
    [example] = chat(tokenizer).examples(record)
    assert learnt(example, tokenizer) == TEMPLATES[name]
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert rendered.startswith(tokenizer.decode(list(example.input_ids)))
    assert example.labels[0] == IGNORE_INDEX
    [prompt] = chat(tokenizer).prompts(record)
    n = len(prompt.input_ids)
    assert list(example.input_ids[:n]) == list(prompt.input_ids), (
        "training and generation see the same tokens"
    )
    assert all(label != IGNORE_INDEX for label in example.labels[n:]), (
        "and all that follows is the last answer"
    )
    assert prompt.reference == "I am fine, thank you."
    assert prompt.text == (
        "user: What is the capital of France?\n\nassistant: The capital of France is Paris.\n\n"
        "user: Où est la gare ?"
    )
    [alone] = chat(tokenizer).prompts({"messages": MESSAGES[:2]})
    assert alone.text == "What is the capital of France?"


def test_tokens_that_do_not_concatenate_are_those_of_the_whole_text(
    make_tokenizer: MakeTokenizer,
) -> None:
    """A SentencePiece-like tokenizer would write another first token for an answer by itself."""
    tokenizer = make_tokenizer(stock.ZEPHYR, kind="metaspace", adds_bos=True)
    [example] = chat(tokenizer).examples({"messages": MESSAGES})
    whole = tokenizer(
        tokenizer.apply_chat_template(MESSAGES, tokenize=False), add_special_tokens=False
    )["input_ids"]
    assert list(example.input_ids) == whole[: len(example)]
    targets = [label for label in example.labels if label != IGNORE_INDEX]
    assert targets.count(tokenizer.eos_token_id) == 2
    assert (
        "".join(tokenizer.convert_ids_to_tokens(targets))
        == "The▁capital▁of▁France▁is▁Paris.</s>I▁am▁fine,▁thank▁you.</s>"
    )


@pytest.mark.parametrize("name", ["LLAMA2", "GEMMA", "CHATML"])
def test_bos_is_what_the_template_writes_and_never_doubled(
    name: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(getattr(stock, name), adds_bos=True)
    [example] = chat(tokenizer).examples({"messages": MESSAGES[:2]})
    assert list(example.input_ids).count(tokenizer.bos_token_id) == (0 if name == "CHATML" else 1)


@pytest.mark.parametrize(("name", "system"), [("THINKING", None), ("SYSTEM_LAST", "Be brief.")])
def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(
    name: str, system: str | None, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(getattr(stock, name))
    format = chat(tokenizer, system=system)
    examples = format.examples({"messages": MESSAGES})
    assert len(examples) == 2
    conversation = format.dialog({"messages": MESSAGES}).messages
    for example, end in zip(examples, [len(conversation) - 3, len(conversation) - 1], strict=True):
        prompt = format.template.prompt(conversation[:end])
        assert list(example.input_ids[: len(prompt)]) == prompt, (
            "what the model meets when it is to answer"
        )
        answer = learnt(example, tokenizer)
        assert (
            answer.removeprefix("<think>\n\n</think>\n\n")
            .lstrip()
            .startswith(conversation[end]["content"])
        )
        assert answer.endswith(("<|im_end|>", "</s>"))


def test_a_default_system_message_is_replaced_by_the_users(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(stock.DEFAULT_SYSTEM)
    [plain] = chat(tokenizer).examples({"messages": MESSAGES})
    [own] = chat(tokenizer, system="Be brief.").examples({"messages": MESSAGES})
    assert "You are a helpful assistant." in tokenizer.decode(list(plain.input_ids))
    text = tokenizer.decode(list(own.input_ids))
    assert "Be brief." in text
    assert "helpful" not in text
    given = [{"role": "system", "content": "Rhyme."}, *MESSAGES]
    [kept] = chat(tokenizer, system="Be brief.").examples({"messages": given})
    assert "Rhyme." in tokenizer.decode(list(kept.input_ids))


def test_all_tokens_but_the_first_can_be_learnt(make_tokenizer: MakeTokenizer) -> None:
    [example] = chat(make_tokenizer(), targets="all").examples({"messages": MESSAGES})
    assert list(example.labels[1:]) == list(example.input_ids[1:])
    assert example.labels[0] == IGNORE_INDEX


SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES},
    "conversations": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[role], "value": content}
            for role, content in TURNS
        ]
    },
    "prompt as messages": {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
    "prompt as messages in texts": {
        "prompt": json.dumps(MESSAGES[:3]),
        "completion": json.dumps(MESSAGES[3:]),
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_the_same_conversation_give_the_same_example(
    shape: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer()
    expected = chat(tokenizer).examples({"messages": MESSAGES})
    assert detected(tokenizer, SHAPES[shape]).examples(SHAPES[shape]) == expected


def test_records_may_differ_in_their_shape(make_tokenizer: MakeTokenizer) -> None:
    """Sources of a mixture, or records of one JSON file, in which other columns are None."""
    tokenizer = make_tokenizer()
    format, expected = (
        detected(tokenizer, SHAPES["messages"]),
        chat(tokenizer).examples({"messages": MESSAGES}),
    )
    nothing = {name: None for record in SHAPES.values() for name in record}
    for record in SHAPES.values():
        assert format.examples(record) == format.examples({**nothing, **record}) == expected
    with pytest.raises(UserError, match="column 'messages' is missing; the columns are text"):
        format.examples({"text": "Hello"})


MIXED: list[dict[str, Any]] = [
    # the same conversation as sources have it
    {"messages": [{"role": "user", "content": "a question\n\nHello"},
                  {"role": "assistant", "content": "fine"}]},
    {"prompt": "a question\n\nHello", "completion": "fine"},
    {"question": "a question\n\nHello", "answer": "fine"},
    {"Question": "a question\n\nHello", "Answer": "fine"},
    {"input": "a question\n\nHello", "output": "fine"},
    {"instruction": "a question", "input": "Hello", "output": "fine"},
    {"Instruction": "a question", "Context": "Hello", "Response": "fine"},
    {"query": "a question\n\nHello", "reply": "fine"},
]  # fmt: skip


@pytest.mark.parametrize("first", range(len(MIXED)))
def test_sources_may_differ_in_the_names_of_their_columns(
    first: int, make_tokenizer: MakeTokenizer
) -> None:
    """Whichever comes first, also with columns that the config names for one of them."""
    tokenizer = make_tokenizer()
    expected = chat(tokenizer).examples(MIXED[0])
    own = {"frage": "a question\n\nHello", "antwort": "fine"}
    named = {"prompt": "frage", "completion": "antwort"}
    for format, records in (
        (detected(tokenizer, MIXED[first]), MIXED),
        (detected(tokenizer, own, named), [own, MIXED[first]]),
    ):
        assert [format.examples(record) for record in records] == [expected] * len(records)
        assert format.notes() == []


def test_a_bad_record_is_not_read_by_other_names(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    asked = detected(tokenizer, {"prompt": "a", "completion": "b", "query": "c"})
    named = {"prompt": "q", "completion": "a"}
    for format, record, expected in (
        (asked, {"prompt": None, "completion": "b", "query": "c"}, "'prompt' must be text"),
        (asked, {"text": "a"}, "column 'prompt' is missing; the columns are text"),
        (detected(tokenizer, {"q": "x", "a": "y"}, named), {"question": "x", "a": "y"},
         "column 'q' is missing"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=expected):
            format.examples(record)


def test_other_lists_in_texts_are_texts(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    for prompt, completion in (("[1, 2]", "[3]"), ("[a", "[b"), (json.dumps(MESSAGES[:1]), "b")):
        [example] = chat(tokenizer, shape="prompt").examples(
            {"prompt": prompt, "completion": completion}
        )
        assert learnt(example, tokenizer) == completion + "<|im_end|>"


WRONG_SIDES: list[tuple[Any, Any, str]] = [
    # question, answer, what is said
    ("Capital?", ["Paris"], "'question' is text, but 'answer' is ['Paris']. Give both as text, or"),
    ("Capital?", {"text": "Paris"}, "'question' is text, but 'answer' is {'text': 'Paris'}. Give"),
    (MESSAGES[:1], "Paris", "'answer' is text, but 'question' is [{'role': 'user', 'content'"),
    ("2+2?", 4, "'answer' must be text or a list of messages, not 4"),
    (True, "yes", "'question' must be text or a list of messages, not True"),
    ("2+2?", None, "'answer' must be text or a list of messages, not None"),
    (["Capital?"], ["Paris"], "column 'question': message 1 must be an object with role and cont"),
    (MESSAGES[:1], ["Paris"], "column 'answer': message 1 must be an object with role and content"),
]


@pytest.mark.parametrize("case", WRONG_SIDES)
def test_the_side_that_is_wrong_is_named_as_in_the_file(
    case: tuple[Any, Any, str], make_tokenizer: MakeTokenizer
) -> None:
    question, answer, expected = case
    format = detected(make_tokenizer(), {"question": "a", "answer": "b"})
    with pytest.raises(UserError) as caught:
        format.examples({"question": question, "answer": answer})
    assert expected in str(caught.value)


def test_questions_and_answers_in_columns(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    conversation = {
        "messages": [
            {"role": "user", "content": "a question\n\nHello"},
            {"role": "assistant", "content": "fine"},
        ]
    }
    expected = chat(tokenizer).examples(conversation)
    records: list[tuple[dict[str, str], dict[str, str]]] = [
        ({"prompt": "a question\n\nHello", "completion": "fine"}, {}),
        ({"instruction": "a question", "input": "Hello", "output": "fine"}, {}),
        ({"instruction": "a question\n\nHello", "input": "", "output": "fine"}, {}),
        ({"instruction": "", "input": "a question\n\nHello", "output": "fine"}, {}),
        ({"instruction": "a question\n\nHello", "output": "fine"}, {}),
        ({"q": "a question\n\nHello", "a": "fine"}, {"prompt": "q", "completion": "a"}),
    ]
    for record, columns in records:
        assert detected(tokenizer, record, columns).examples(record) == expected, record


def detected(tokenizer: Any, record: Any, columns: Any = None, **options: Any) -> Any:
    chosen = format_options(columns=columns or {}, **options)
    return build_format("auto", chosen, tokenizer=tokenizer, first_record=record)


def test_what_follows_the_last_answer_is_left_out(make_tokenizer: MakeTokenizer) -> None:
    format = chat(make_tokenizer())
    assert format.examples(
        {"messages": [*MESSAGES, {"role": "user", "content": "And you?"}]}
    ) == format.examples({"messages": MESSAGES})


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


USER, ANSWER = message("user", "Hello"), message("assistant", "I am fine.")
BAD: dict[str, tuple[Any, str]] = {
    "no assistant turn": ([USER], "no assistant turn"),
    "nothing": ([], "no assistant turn"),
    "two users in a row": (
        [USER, USER, ANSWER],
        "message 2 is from user after user, but must be from assistant; user and ",
    ),
    "assistant first": (
        [ANSWER, USER, ANSWER],
        "message 1 is from assistant at the start, but must be from user",
    ),
    "system in the middle": (
        [USER, ANSWER, message("system", "x"), USER, ANSWER],
        "message 3 is from system after assistant",
    ),
    "only a system message": ([message("system", "x")], "no assistant turn"),
    "unknown role": (
        [message("robot", "x"), ANSWER],
        "message 1 has the unknown role 'robot'; known are system, developer, user, human, ",
    ),
    "empty answer": ([USER, message("assistant", "  ")], "message 2 (assistant) is empty"),
    "empty question": ([message("user", ""), ANSWER], "message 1 (user) is empty"),
    "content that is no text": (
        [USER, message("assistant", None)],
        "the content of message 2 (assistant) must be text, not None",
    ),
    "a string": ("Hello", "a conversation is a list of messages, not 'Hello'"),
    "a list of strings": (
        ["Hello"],
        "message 1 must be an object with role and content, not 'Hello'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_conversation_is_refused_in_one_sentence(
    case: str, make_tokenizer: MakeTokenizer
) -> None:
    messages, expected = BAD[case]
    with pytest.raises(UserError) as caught:
        chat(make_tokenizer()).examples({"messages": messages})
    assert expected in str(caught.value)


def test_a_missing_column_is_named_with_those_there_are(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(
        UserError,
        match=r"column 'completion' is missing; the columns are prompt, complete\. "
        r"Did you mean 'complete'\?",
    ):
        chat(make_tokenizer(), shape="prompt").examples({"prompt": "a", "complete": "b"})


TEMPLATE_ERRORS = {
    "{{ raise_exception('only in rhyme') }}": "fails on this conversation: only in rhyme",
    "{% for m in messages %}{{ m.content.upper( }}{% endfor %}": "the chat template fails on this",
    "{{ nothing.at.all }}": "the chat template fails on this conversation: 'nothing' is undefined",
    stock.OTHER_HEADER: "the chat template cannot be split before an answer",
    stock.NO_END: "is not a special token, so a model trained with it would never stop",
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}</s>{% endif %}{% endfor %}": (
        "leaves out the assistant"
    ),
}


@pytest.mark.parametrize("template", TEMPLATE_ERRORS)
def test_a_template_that_cannot_be_used_is_refused(
    template: str, make_tokenizer: MakeTokenizer
) -> None:
    with pytest.raises(UserError) as caught:
        chat(make_tokenizer(template)).examples({"messages": MESSAGES})
    assert TEMPLATE_ERRORS[template] in str(caught.value)


def test_no_template_at_all_says_what_to_do(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match=r"no chat template\. Set model\.chat_template to chatml"):
        chat(make_tokenizer(None))


def test_there_was_something_to_check() -> None:
    assert (len(TEMPLATES), len(SHAPES), len(BAD), len(TEMPLATE_ERRORS)) == (6, 4, 12, 6)
    assert (len(MIXED), len(WRONG_SIDES)) == (8, 8)
