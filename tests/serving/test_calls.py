"""Calls of tools in answers: in OpenAI's shape, with all that is said beside them."""

import json

import pytest

from tests.serving.conftest import ASK, TOOL, WRITES_TOOLS, answer, post, saying, with_template

CALL = '<tool_call>{"name": "add"}</tool_call>'
BAD = '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'
SAID = {  # what the model says, what is asked -> content, number of calls, why it ended
    "a call": (CALL, {}, None, 1, "tool_calls"),
    "text before": (f"Hm, so. {CALL}", {}, "Hm, so.", 1, "tool_calls"),
    "text after": (f"{CALL}\nDone.", {}, "Done.", 1, "tool_calls"),
    "text everywhere": (f"a {CALL} b {CALL} c", {}, "a  b  c", 2, "tool_calls"),
    "the second is cut": (f"{CALL}{CALL}", {"max_tokens": -8}, None, 1, "length"),
    "a stop text in the second": (f"a {CALL}b{CALL}", {"stop": ["b<"]}, "a", 1, "tool_calls"),
    "a stop text after the call": (f"a {CALL} b c", {"stop": [" c"]}, "a  b", 1, "tool_calls"),
    "a stop text in the end": (f"a {CALL}", {"stop": ["</tool_call>"]}, "a", 1, "tool_calls"),
    "not a number": (BAD, {}, BAD, 0, "stop"),
    "none": (" Hello ", {}, " Hello ", 0, "stop"),
    "none may be": (CALL, {"tool_choice": "none"}, CALL, 0, "stop"),
}  # fmt: skip


def reply_of(server, stream, **asked):
    """Return the content, the calls and the ending of an answer, put together if it is streamed."""
    reply = answer(server, tools=[TOOL], stream=stream, **asked)
    choices = [part.choices[0] for part in reply] if stream else [reply.choices[0]]
    messages = [choice.delta if stream else choice.message for choice in choices]
    calls = [call for message in messages for call in message.tool_calls or ()]
    content = "".join(message.content for message in messages if message.content)
    return content or None, calls, choices[-1].finish_reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", SAID)
def test_calls_and_what_is_said_beside_them(server, monkeypatch, name, stream):
    """The tiny model, which never learnt to call, is made to say this."""
    text, asked, content, count, ending = SAID[name]
    model = with_template(server, monkeypatch, WRITES_TOOLS)
    size = len(model.tokenizer(text).input_ids)
    most = size + asked.get("max_tokens", 10)
    hook = model.model.register_forward_hook(saying(model.tokenizer, text))
    try:
        said, calls, why = reply_of(server, stream, **{**asked, "max_tokens": most})
    finally:
        hook.remove()
    if name == "the second is cut":  # its beginning is text, and not dropped
        assert CALL.startswith(said)
        said = None
    assert (said, len(calls), why) == (content, count, ending)
    assert [call.function.name for call in calls] == ["add"] * count


@pytest.mark.parametrize("stream", [False, True])
def test_the_arguments_of_a_call_are_json(server, monkeypatch, stream):
    model = with_template(server, monkeypatch, WRITES_TOOLS)
    text = '<tool_call>{"name": "add", "arguments": {"a": 3}}</tool_call>'
    hook = model.model.register_forward_hook(saying(model.tokenizer, text))
    try:
        _, [call], _ = reply_of(server, stream, max_tokens=80)
    finally:
        hook.remove()
    assert json.loads(call.function.arguments) == {"a": 3}


def test_a_template_that_writes_calls_and_tools_gets_them(server, monkeypatch):
    with_template(server, monkeypatch, WRITES_TOOLS)
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [*ASK, {"role": "assistant", "tool_calls": [call]}]
    messages.append({"role": "tool", "content": "7"})
    reply = post(server, {"model": "trained", "messages": messages, "tools": [TOOL]})
    assert reply.status_code == 200, reply.text
