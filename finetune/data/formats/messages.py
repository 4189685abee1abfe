"""The messages of a record, in the shapes that people keep them in, as a chat template reads them.

A message has role and content (OpenAI) or from and value (ShareGPT). All that it also says is kept
for the template under one name: thoughts as `reasoning_content`, calls as `tool_calls`.
"""

import json
from collections.abc import Mapping, Sequence

from finetune.data.types import Message
from finetune.errors import UserError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Name of a role -> what templates call it."""

THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")
SWITCHES = ("weight", "loss_weight", "train", "training", "train_on_turn", "loss", "loss_mask")
"""Keys that say whether an answer is learnt."""

_SPOKEN = ("role", "from", "content", "value", "function_call", *THOUGHTS, *SWITCHES)
_TEXT_PARTS = ("text", "input_text", "output_text")
_ARGUMENTS = ("arguments", "parameters", "args")
_BESIDE_CALL = ("id", "type", "index")


def read_messages(value: object) -> tuple[list[Message], set[int]]:
    """Return messages in OpenAI's or ShareGPT's shape, and the places of answers not to learn.

    They may be a text of JSON, as tables hold them, or an object with a list for each key, as
    Parquet files of `datasets` do. Raises UserError for anything else.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, "a conversation")
    value = _transposed(value) if isinstance(value, Mapping) else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"a conversation is a list of messages, not {value!r:.80}")
    messages, muted = [], set()
    for number, item in enumerate(value, start=1):
        if _is_plain(item):  # most are
            messages.append({"role": ROLES[item["role"]], "content": item["content"]})
            continue
        if not isinstance(item, Mapping):
            raise UserError(
                f"message {number} must be an object with role and content, not {item!r:.80}"
            )
        message = _message(item, number)
        messages.append(message)
        if not _is_learnt(item, message["role"], number):
            muted.add(number - 1)
    return messages, muted


def holds_messages(text: str) -> bool:
    """Return whether a text is the JSON of a list of messages, as tables hold one."""
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(isinstance(m, dict) and {"role", "from"} & set(m) for m in value)


def _transposed(columns: Mapping[str, object]) -> object:
    """Return an object with a list for each key as a list of objects; anything else as it is."""
    lists = [value for value in columns.values() if isinstance(value, list | tuple)]
    if not lists or len(lists) < len(columns) or len(set(map(len, lists))) > 1:
        return columns
    return [dict(zip(columns, values)) for values in zip(*lists)]


def _is_plain(item: object) -> bool:
    """Return whether a message is a role and a text in OpenAI's shape, and nothing else."""
    return (
        isinstance(item, dict)
        and item.keys() == {"role", "content"}
        and isinstance(item["content"], str)
        and isinstance(item["role"], str)
        and ROLES.get(item["role"]) in ("system", "developer", "user", "assistant")
        and item["role"] != "function_call"
    )


def _message(item: Mapping[str, object], number: int) -> Message:
    given = _one_of(item, ("role", "from"), number)
    role = given.lower() if isinstance(given, str) else given
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(
            f"message {number} has the unknown role {given!r}; known are {', '.join(ROLES)}"
        )
    content = _one_of(item, ("content", "value"), number)
    message: Message = {"role": ROLES[role]}
    calls = _calls(item, content if role == "function_call" else None, number)
    if role == "function_call" or (calls and content is None):
        content = ""
    message["content"] = _text(content, number, role)
    thoughts = _one_of(item, THOUGHTS, number)
    if thoughts:
        if not isinstance(thoughts, str):
            raise UserError(f"the thoughts of message {number} must be text, not {thoughts!r:.40}")
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    message |= {
        key: value
        for key, value in item.items()
        if key not in _SPOKEN and key != "tool_calls" and value not in (None, "", [], {})
    }
    return message


def _calls(item: Mapping[str, object], content: object, number: int) -> list[dict[str, object]]:
    """Return the calls of a message, under whichever keys it has them.

    `content`: the content if it is a call, else None. Raises UserError for calls that differ.
    """
    where = f"message {number}"
    given = {"tool_calls": item.get("tool_calls")}
    given["function_call"] = [item["function_call"]] if item.get("function_call") else None
    if content is not None:
        call = from_json(content, f"the call in {where}")
        given["content"] = call if isinstance(call, list) else [call]
    found = {key: read_calls(calls, where) for key, calls in given.items() if calls}
    said = {key: [call["function"] for call in calls] for key, calls in found.items()}
    _one_of(said, tuple(said), number)
    return next(iter(found.values()), [])


def _one_of(item: Mapping[str, object], keys: Sequence[str], number: int) -> object:
    """Return the value under the one of `keys` that the message has, or None."""
    given = {key: item[key] for key in keys if item.get(key) is not None}
    values = list(given.values())
    if any(value != values[0] for value in values):
        raise UserError(
            f"message {number} has {' and '.join(given)}, which differ. Keep one of them"
        )
    return values[0] if values else None


def _text(content: object, number: int, role: str) -> str:
    """Return the content as text. A list of parts of text is joined; a tool may answer in JSON."""
    if isinstance(content, list | tuple) and content:
        parts = [_part(part, number) for part in content]
        if None not in parts:
            return "".join(part for part in parts if part is not None)
    if ROLES[role] == "tool" and isinstance(content, dict | list):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise UserError(
            f"the content of message {number} ({role}) must be text, not {content!r:.80}"
        )
    return content


def _part(part: object, number: int) -> str | None:
    """Return the text of a part of the content, or None if it is no part of a known kind.

    Raises UserError for a part that is no text, such as an image.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or "type" not in part:
        return None
    said = {key: value for key, value in part.items() if value is not None}
    if part["type"] in _TEXT_PARTS and said.keys() == {"type", "text"}:
        if isinstance(part["text"], str):
            return part["text"]
        raise UserError(
            f"message {number} has a part of the content whose text is {part['text']!r:.80}. "
            "Parts must be like {type: text, text: ...}, and the text a string"
        )
    raise UserError(
        f"message {number} has a part of the content that is not text alone: {dict(part)!r:.80}. "
        "Parts must be like {type: text, text: ...}"
    )


def _is_learnt(item: Mapping[str, object], role: str, number: int) -> bool:
    """Return whether a message is learnt, as far as it says so. Raises UserError."""
    switches = {key: item[key] for key in SWITCHES if item.get(key) is not None}
    for key, value in switches.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(
                f"{key} of message {number} must be 0 or 1 (false or true), not {value!r:.80}"
            )
        if value and role != "assistant":
            raise UserError(
                f"message {number} ({role}) has {key}: {value!r}, but only answers can be learnt "
                "turn by turn. Remove it; data.targets=all learns every turn"
            )
    if len({bool(value) for value in switches.values()}) > 1:
        raise UserError(f"message {number} has {' and '.join(switches)}, which differ. Keep one")
    return all(switches.values())


def read_calls(value: object, where: str) -> list[dict[str, object]]:
    """Return calls of tools in OpenAI's shape, with arguments as an object.

    Raises UserError for anything that is no list of calls.
    """
    calls = from_json(value, f"tool_calls of {where}")
    if not isinstance(calls, list):
        raise UserError(f"tool_calls of {where} must be a list of calls, not {calls!r:.80}")
    return [_call(call, f"call {number} of {where}") for number, call in enumerate(calls, start=1)]


def _call(value: object, where: str) -> dict[str, object]:
    outer = _said(value)
    flat = {key: outer.pop(key) for key in [*outer] if key not in _BESIDE_CALL}
    call = _said(flat.pop("function")) if "function" in flat else flat
    if not isinstance(call.get("name"), str):
        raise UserError(f"{where} must be like {{name: ..., arguments: ...}}, not {value!r:.80}")
    given = {key: call[key] for key in _ARGUMENTS if key in call}
    if any(item != next(iter(given.values())) for item in given.values()):
        raise UserError(f"{where} has {' and '.join(given)}, which differ. Keep one of them")
    if call is not flat and flat:
        raise UserError(
            f"{where} has {min(flat)!r} beside function, where id, type and index may be. Move it "
            "into function, or remove it"
        )
    if more := call.keys() - {"name", *_ARGUMENTS, *_BESIDE_CALL}:
        raise UserError(
            f"{where} has {min(more)!r}, and a call has a name and arguments. Rename it, or remove "
            "it"
        )
    text = next(iter(given.values()), "")
    arguments = {} if text == "" else from_json(text, f"arguments of {where}")
    if not isinstance(arguments, Mapping):
        raise UserError(f"arguments of {where} must be an object, not {text!r:.80}")
    return {
        **({"id": outer["id"]} if outer.get("id") else {}),
        "type": "function",
        "function": {"name": call["name"], "arguments": dict(arguments)},
    }


def _said(value: object) -> dict[str, object]:
    """Return the keys of a mapping whose values are not null; {} for anything else."""
    if not isinstance(value, Mapping):
        return {}
    return {str(key): item for key, item in value.items() if item is not None}


def read_tools(value: object) -> list[dict[str, object]] | None:
    """Return the tools of a record as JSON schemas; None if there are none.

    `value` is a list of objects, or the same as a text of JSON, or a list of such texts. Raises
    UserError.
    """
    tools = from_json(value, "the column of tools") if value else None
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [from_json(tool, "a tool") for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"tools must be a list of objects, not {tools!r:.80}")
    return [dict(tool) for tool in tools]


def read_options(value: object) -> dict[str, object]:
    """Return the variables of a record for its template: an object, or a text of JSON; no nulls.

    Raises UserError for anything else.
    """
    options = from_json(value, "chat_template_kwargs") if value else {}
    if not isinstance(options, Mapping):
        raise UserError(f"chat_template_kwargs must be an object, not {options!r:.80}")
    return {key: item for key, item in options.items() if item is not None}


def from_json(value: object, what: str) -> object:
    """Return the value of a text of JSON, or anything else as it is; `what` names it in errors."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} must be JSON, not {value!r:.80} ({error})") from error


def merge_turns(messages: Sequence[Message], muted: set[int]) -> tuple[list[Message], set[int]]:
    """Return the messages with turns of one role in a row as one, joined by a blank line.

    `muted` are the places of answers not to learn. Turns that say more than text, a tool's answers,
    and an answer to learn beside one that is not, stay apart.
    """
    merged: list[Message] = []
    places: set[int] = set()
    for place, message in enumerate(messages):
        last = merged[-1] if merged else None
        is_muted = place in muted
        if (
            last is not None
            and message["role"] == last["role"] != "tool"
            and message.keys() == last.keys() == {"role", "content"}
            and is_muted == (len(merged) - 1 in places)
        ):
            texts = [text for text in (last["content"], message["content"]) if text.strip()]
            merged[-1] = {**last, "content": "\n\n".join(texts)}
            continue
        if is_muted:
            places.add(len(merged))
        merged.append(message)
    return merged, places


def check_order(messages: Sequence[Message], *, merged: bool = False) -> None:
    """Raise UserError unless the messages are in an order that a template can write.

    A system message may come first. Then user and assistant take turns. After an assistant's call
    come the tool's answers, and then the assistant again. Only a system message or a tool's answer
    may be empty, and an assistant's content beside a call. `merged`: data.merge_turns is true.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            "the conversation has no assistant turn, so there is nothing to learn from it"
        )
    before = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if number == 1 and role in ("system", "developer"):
            continue
        allowed = _allowed_after(before)
        may_join = not merged and before is not None and before["role"] == role
        if role not in allowed:
            after = f"after {messages[number - 2]['role']}" if number > 1 else "at the start"
            raise UserError(
                f"roles out of order: message {number} is from {role} {after}, but must "
                f"be from {' or '.join(allowed)}; user and assistant take turns, after an optional "
                "system message, and a tool answers a call"
                + (". Set data.merge_turns=true to join them" if may_join else "")
            )
        if role != "tool" and not message["content"].strip() and not message.get("tool_calls"):
            raise UserError(f"message {number} ({role}) is empty")
        before = message


def _allowed_after(message: Message | None) -> tuple[str, ...]:
    if message is None:
        return ("user",)
    if message["role"] == "assistant":
        return ("tool",) if message.get("tool_calls") else ("user",)
    return ("assistant", "tool") if message["role"] == "tool" else ("assistant",)


def conversation_text(messages: Sequence[Message], tools: Sequence[object] | None = None) -> str:
    """Return what a person reads of the messages before an answer.

    A single question is itself. Otherwise each message has its role in front.
    """
    if len(messages) == 1 and not tools:
        return str(messages[0]["content"])
    parts = [f"tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    for message in messages:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in called(message)]
        said = [message.get("reasoning_content"), message["content"], *calls]
        parts.append(f"{message['role']}: " + "\n".join(str(part) for part in said if part))
    return "\n\n".join(parts)


def called(message: Message) -> list[dict[str, object]]:
    """Return the calls of a message, if any."""
    return list(message.get("tool_calls") or ())
