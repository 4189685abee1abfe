"""Calls of tools in answers: those that can be read, and those that the data has too.

A tokenizer may know how its model writes calls (a response template of transformers). Otherwise
calls are read in the form of Hermes and Qwen: JSON with a name and arguments in <tool_call>.
"""

import json
import re
from collections.abc import Mapping, Sequence

from finetune.data.types import Prompt, Tokenizer

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def read_answer_calls(
    tokenizer: Tokenizer, answer: Sequence[int], *, prompt: Sequence[int]
) -> list[dict[str, object]] | None:
    """Return the calls in an answer as {"name", "arguments"}; None if there are none to be read."""
    if getattr(tokenizer, "response_template", None):
        try:
            message = tokenizer.parse_response(list(answer), prefix=list(prompt))
        except Exception:  # an answer may be anything, and so may the parser's complaint
            return None
        found = list(message.get("tool_calls") or ())
    else:
        text = tokenizer.decode(list(answer), skip_special_tokens=False)
        try:
            found = [json.loads(call) for call in _CALL.findall(text)]
        except (ValueError, RecursionError):
            return None
    calls = [_call(item) for item in found]
    return [call for call in calls if call] if calls and all(calls) else None


def text_before_calls(tokenizer: Tokenizer, answer: Sequence[int], *, prompt: Sequence[int]) -> str:
    """Return what an answer that calls tools says before its first call; "" if nothing."""
    if getattr(tokenizer, "response_template", None):
        message = tokenizer.parse_response(list(answer), prefix=list(prompt))
        return str(message.get("content") or "").strip()
    text = str(tokenizer.decode(list(answer), skip_special_tokens=False))
    before = _CALL.split(text, maxsplit=1)[0]
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            before = before.replace(str(token), "")
    return before.strip()


def _call(item: object) -> dict[str, object] | None:
    call = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, Mapping):
        return None
    return {"name": call["name"], "arguments": dict(arguments)}


def judge_calls(tokenizer: Tokenizer, prompt: Prompt, answer: Sequence[int]) -> tuple[bool, bool]:
    """Return whether the answer's calls parse, and whether they equal those of the reference.

    Names and arguments count, and the order of the calls.
    """
    calls = read_answer_calls(tokenizer, answer, prompt=prompt.input_ids)
    return calls is not None, calls == [dict(call) for call in prompt.tool_calls]


def call_scores(judged: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Return the shares of answers whose calls parse and are equal; nothing if none was judged."""
    if not judged:
        return {}
    parsed, equal = zip(*judged)
    return {
        "tool_calls_parsed": sum(parsed) / len(judged),
        "tool_calls_equal": sum(equal) / len(judged),
    }
