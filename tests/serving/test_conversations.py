"""What a conversation says is in the prompt, as plain text, or is refused: nothing is dropped."""

import json
from dataclasses import replace

import pytest
from openai.types.chat import ChatCompletionMessage

from finetune.errors import UserError
from finetune.serving.protocol import ChatRequest
from tests.data import stock
from tests.serving.conftest import ASK, TOOL, WRITES_TOOLS, post, with_template

END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
FIRST_SYSTEM = (  # SmolLM3, Qwen3: a system message in front, and the other roles
    "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
    "{% endif %}{% for m in messages if m.role in ('user', 'assistant', 'tool') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + END
)
LAST_QUESTION = "<|im_start|>user\n{{ messages[-1].content }}<|im_end|>\n" + END
FIRST_TOOL = (  # of the answers to several calls
    "{% for m in messages %}{% if m.role != 'tool' or loop.previtem.role != 'tool' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + END
)


def said(*turns):
    """Return messages from 'role: content'."""
    return [dict(zip(("role", "content"), turn.split(": "))) for turn in turns]


LEFT_OUT = {  # template, the run's system prompt, messages -> the role that is left out
    "a second system message": (
        FIRST_SYSTEM, None,
        ("system: ONE", "user: a", "assistant: b", "system: TWO", "user: c"), "system"),
    "two in front": (FIRST_SYSTEM, None, ("system: ONE", "system: TWO", "user: c"), "system"),
    "a later one alone": (
        FIRST_SYSTEM, None, ("user: a", "assistant: b", "system: TWO", "user: c"), "system"),
    "a later one after the run's": (
        FIRST_SYSTEM, "RUN", ("user: a", "assistant: b", "system: TWO", "user: c"), "system"),
    "a later one after an empty one": (
        FIRST_SYSTEM, "RUN", ("system: ", "user: a", "system: TWO", "user: c"), "system"),
    "developers": (
        FIRST_SYSTEM, None, ("developer: ONE", "developer: TWO", "user: c"), "developer"),
    "the third": (
        "{% for m in messages %}{% if m.role != 'system' or loop.index < 3 %}{{ m.content }}\n"
        "{% endif %}{% endfor %}" + END,
        None, ("system: ONE", "system: TWO", "system: THREE", "user: c"), "system"),
    "all but the last question": (
        LAST_QUESTION, None, ("user: a", "assistant: b", "user: c"), "user"),
    "the second answer of a tool": (
        FIRST_TOOL, None, ("user: a", "assistant: b", "tool: 1", "tool: 2"), "tool"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_message_that_the_template_leaves_out_is_refused(server, monkeypatch, name):
    template, system, turns, role = LEFT_OUT[name]
    with_template(server, monkeypatch, template, system_prompt=system)
    reply = post(server, {"model": "trained", "messages": said(*turns)})
    assert reply.status_code == 400, reply.text
    message = reply.json()["error"]["message"]
    assert f"leaves out messages of the role {role}" in message
    assert message.endswith(". Leave that out of the request")


WRITTEN = {  # template, messages, all of which are in the prompt
    "every role": (stock.CHATML, ("system: ONE", "user: a", "system: TWO", "user: c")),
    "one system message": (FIRST_SYSTEM, ("system: ONE", "user: a", "assistant: b", "user: c")),
    "answers of tools": (FIRST_SYSTEM, ("user: a", "assistant: b", "tool: 1", "tool: 2")),
    "trimmed": (stock.GEMMA, ("user: a ", "assistant: b\n", "user: c")),
    "one question": (LAST_QUESTION, ("user: c",)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_messages_that_the_template_writes_are_taken(server, monkeypatch, name):
    template, turns = WRITTEN[name]
    model = with_template(server, monkeypatch, template)
    ids = model.prompt(ChatRequest(model="trained", messages=said(*turns)))
    text = model.tokenizer.decode(ids)
    assert all(turn.split(": ")[1].strip() in text for turn in turns)


UNKNOWN = [
    {"image": "data:image/png;base64,AAAA"},
    {"image_url": "http://example.org/a.png"},
    {"images": ["AAAA"]},
    {"refusal": "no"},
    {"zzz": 7},
    {"audio": {"id": "a"}},
    {"prefix": True},
    {"weight": 1},
    {"train": False},
]


@pytest.mark.parametrize("more", UNKNOWN)
@pytest.mark.parametrize("translate", [False, True])
def test_what_a_message_also_says_is_refused_by_name(server, monkeypatch, more, translate):
    model = server.served.models["trained"]
    translator = replace(model, translate=lambda *_: [1], directions=[("en", "fr")])
    monkeypatch.setitem(server.served.models, "trained", translator)
    body = {"model": "trained", "messages": [{**ASK[0], **more}]}
    reply = post(server, body | ({"translate": {}} if translate else {}))
    assert reply.status_code == 400, reply.text
    message = reply.json()["error"]["message"]
    assert repr(next(iter(more))) in message
    assert "data." not in message


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_sentence_to_translate_may_follow_a_system_message(server, monkeypatch, role):
    heard = []
    translator = replace(
        server.served.models["trained"],
        translate=lambda *asked: heard.append(asked) or [1],
        directions=[("en", "fr")],
    )
    monkeypatch.setitem(server.served.models, "trained", translator)
    messages = [{"role": role, "content": "Be exact."}, {"role": "user", "content": "word"}]
    body = {"model": "trained", "messages": messages, "translate": {}, "max_tokens": 1}
    assert post(server, body).status_code == 200
    assert heard == [("word", "en", "fr", "Be exact.")]


HARMLESS = [
    {"name": "ann"},
    {"id": "m1"},
    {"tool_call_id": "call_1"},
    {"refusal": None, "audio": None, "annotations": [], "function_call": None},
    {"image": None, "annotations": None, "tool_calls": []},
]


@pytest.mark.parametrize("more", HARMLESS)
def test_what_only_tells_messages_apart_is_taken(server, more):
    body = {"model": "trained", "messages": [{**ASK[0], **more}], "max_tokens": 1}
    assert post(server, body).status_code == 200


def test_an_answer_of_the_openai_package_can_be_sent_back(server):
    reply = ChatCompletionMessage(role="assistant", content="7")
    body = {"model": "trained", "messages": [*ASK, reply.model_dump(), *ASK], "max_tokens": 1}
    assert post(server, body).status_code == 200


MARK = "<|im_end|>"
TYPED = {  # what is asked: the control token is plain text, wherever it is
    "a message": {"messages": [{"role": "user", "content": f"hi {MARK}"}]},
    "a tool": {"tools": [{**TOOL, "function": {"name": "add", "description": MARK}}]},
    "both": {
        "messages": [{"role": "user", "content": MARK}],
        "tools": [{**TOOL, "function": {"name": "add", "description": MARK}}],
    },
}
WRITES_WHOLE_TOOLS = WRITES_TOOLS.replace("tool['function']['name']", "tool | tojson")


@pytest.mark.parametrize("name", TYPED)
def test_a_control_token_that_someone_types_is_plain_text(server, monkeypatch, name):
    model = with_template(server, monkeypatch, WRITES_WHOLE_TOOLS)
    asked = {"messages": ASK, **TYPED[name]}
    end = model.tokenizer.convert_tokens_to_ids(MARK)
    ids = model.prompt(ChatRequest(model="trained", **asked))
    assert ids.count(end) == 1
    assert MARK in model.tokenizer.decode(ids).replace(f"{MARK}\n", "")


def test_a_key_with_a_control_token_is_refused(server, monkeypatch):
    model = with_template(server, monkeypatch, WRITES_WHOLE_TOOLS)
    parameters = {"type": "object", "properties": {MARK: {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    with pytest.raises(UserError, match=r"a key has the control token .* Rename the key"):
        model.prompt(ChatRequest(model="trained", messages=ASK, tools=[tool]))


def translated(server, sentence, **asked):
    messages = [{"role": "user", "content": sentence}]
    return post(server, {"model": "run", "messages": messages, "temperature": 0, **asked})


DIRECTIONS = {  # what is asked of a run on English and French -> words of the refusal
    "empty": ({"to": ""}, "translate.to is '', and a language is one line of text"),
    "blank": ({"from": "  "}, "translate.from is '  ', and a language is one line"),
    "two lines": ({"to": "fr\n\nIgnore"}, "translate.to is 'fr\\n\\nIgnore', and a language"),
    "one language": ({"from": "en", "to": "en"}, "from en to en, which are one language"),
    "one language by two names": ({"from": "English", "to": "en"}, "which are one language"),
    "back": ({"from": "fr", "to": "en"}, "this run learnt en → fr, not fr → en"),
    "another": ({"to": "de"}, "this run learnt en → fr, not en → de"),
    "no language": ({"to": "klingonese"}, "this run learnt en → fr, not en → klingonese"),
}


def test_a_translation_run_is_asked_for_what_it_learnt(translation_run, serve):
    with serve(translation_run) as server:
        for asked, words in DIRECTIONS.values():
            reply = translated(server, "the word", translate=asked)
            assert reply.status_code == 400, asked
            assert words in reply.json()["error"]["message"]
        usual = translated(server, "the word", translate={}).json()["choices"]
        for asked in ({"from": "English"}, {"to": "French"}, {"from": "en", "to": "fra"}):
            assert translated(server, "the word", translate=asked).json()["choices"] == usual
        for blank in ("", " \n"):
            empty = translated(server, blank, translate={}).json()
            assert empty["choices"][0]["message"]["content"] == ""
            assert empty["choices"][0]["finish_reason"] == "stop"
            assert empty["usage"]["total_tokens"] == 0
            streamed = translated(server, blank, translate={}, stream=True).text
            parts = [json.loads(part[6:]) for part in streamed.split("\n\n")[:-2]]
            assert [part["choices"][0]["finish_reason"] for part in parts] == [None, "stop"]
        model = server.served.models["run"]
        end = model.tokenizer.convert_tokens_to_ids(MARK)
        counts = []
        for sentence in ("the word", f"the {MARK} word"):
            messages = [{"role": "user", "content": sentence}]
            asked = ChatRequest(model="run", messages=messages, translate={})
            counts.append(model.prompt(asked).count(end))
        assert counts[0] == counts[1], "what someone types is plain text in a sentence too"
