"""Calls of tools in answers: those that can be read, and those that the data has too.

A tokenizer may know how its model writes calls (a response template of transformers). Otherwise
calls are read in the form of Hermes and Qwen: JSON with a name and arguments in <tool_call>.
"""

import json
import re
from collections.abc import Mapping, Sequence

from finetune.data.types import Prompt, Tokenizer

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_CALL_AS_IT_IS = re.compile(r"(<tool_call>.*?</tool_call>)", re.DOTALL)


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


def text_beside_calls(
    tokenizer: Tokenizer, answer: Sequence[int], *, prompt: Sequence[int], length: int | None = None
) -> str:
    """Return what an answer that calls tools says before, between and after them; "" if nothing.

    `length`: how many characters of the answer count, special tokens aside; None for all. A stop
    text may have ended it there. With a response template all of them count.
    """
    if getattr(tokenizer, "response_template", None):
        message = tokenizer.parse_response(list(answer), prefix=list(prompt))
        said = [text for key, text in message.items() if key != "role" and isinstance(text, str)]
        return "\n\n".join(text.strip() for text in said if text.strip())
    text = str(tokenizer.decode(list(answer), skip_special_tokens=False))
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    left, beside = len(text) if length is None else length, ""
    for number, part in enumerate(_CALL_AS_IT_IS.split(text)):  # beside, a call, beside, ...
        for token in special:
            part = part.replace(token, "")
        if number % 2 == 0:
            beside += part[:left]
        left = max(0, left - len(part))
    return beside.strip()


def _call(item: object) -> dict[str, object] | None:
    """Return a call by its name and its arguments; None if it is none, or is not JSON.

    Python reads NaN, Infinity and lone surrogates, which JSON has not.
    """
    try:
        json.dumps(item, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return None
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
    return calls is not None, _are_equal(calls, prompt.tool_calls)


def _are_equal(one: object, other: object) -> bool:
    """Return whether two values of JSON are equal. To Python true would be 1, and false 0."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return one == other


def call_scores(judged: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Return the shares of answers whose calls parse and are equal; nothing if none was judged."""
    if not judged:
        return {}
    parsed, equal = zip(*judged)
    return {
        "tool_calls_parsed": sum(parsed) / len(judged),
        "tool_calls_equal": sum(equal) / len(judged),
    }
