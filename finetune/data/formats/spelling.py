"""What a chat template makes of what it gets: calls as it reads them, and texts as it writes them.

Arguments of calls are an object for it, or the same as a text of JSON.
"""

import json
import re
from collections.abc import Callable, Sequence

from finetune.data.types import Message
from finetune.errors import UserError


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


def require_texts(messages: Sequence[Message], written: str) -> None:
    """Raise UserError if a text of users or assistants, or thoughts of it, are not in `written`.

    Thoughts are apart, or in the content. White space and a question's switches do not count.
    """
    squeezed = "".join(written.split())
    for message in messages:
        content = str(message.get("content") or "")
        thoughts = [str(message.get("reasoning_content") or "")]
        if "</think>" in content and message["role"] == "assistant":
            thoughts.append(content.split("</think>")[0].split("<think>")[-1])
            content = content.split("</think>")[-1]
        for text in thoughts:
            if "".join(text.split()) not in squeezed:
                raise UserError(
                    "the chat template leaves out the thoughts of an answer, "
                    f"{text.strip()[:40]!r}. Use a template that writes them "
                    "(model.chat_template), or remove them"
                )
        role = message["role"]
        is_there = role not in ("user", "assistant") or "".join(content.split()) in squeezed
        if not is_there and (role == "assistant" or _spoken(content) not in _spoken(written)):
            raise UserError(
                f"the chat template does not write the {message['role']}'s text as it is, "
                f"{content.strip()[:40]!r}. Use a template that does (model.chat_template)"
            )


def _spoken(text: str) -> str:
    """Return a text without white space and switches, such as /no_think."""
    return "".join(re.sub(r"(?<!\S)/\w+|<\w+>", " ", text).split())
