"""Arguments of calls as a chat template reads them: an object, or the same as a text of JSON."""

import json
from collections.abc import Callable

from finetune.data.types import Message


def reads_text(render: Callable[[list[Message]], str]) -> bool:
    """Return whether a template takes arguments for text, as found by rendering a call.

    Most templates write an object as JSON. DeepSeek's puts texts together, and fails on an object.
    """
    function = {"name": "zwqx", "arguments": {"place": "Qxwz"}}
    calls = [{"id": "zwqx00000", "type": "function", "function": function}]
    call: Message = {"role": "assistant", "content": "", "tool_calls": calls}

    def writes(message: Message) -> bool:
        try:
            text = render([{"role": "user", "content": "a"}, message])
        except Exception:  # a template is a program of the user's: it may raise anything
            return False
        return "zwqx" in text and "Qxwz" in text

    return not writes(call) and writes(with_text(call))


def with_text(message: Message) -> Message:
    """Return a message with the arguments of its calls as texts."""
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
