"""Conversations, rendered with a chat template.

Accepted shapes of a record:

- `messages` or `conversations`: a list of {"role", "content"} (OpenAI) or {"from", "value"}
  (ShareGPT);
- `prompt` and `completion`: both strings or both lists of messages;
- `instruction` and `output`: with an optional `input`, which is written below the instruction.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.data.formats.columns import column, text_column
from finetune.data.formats.rendering import ChatTemplate
from finetune.data.types import Example, Message, Prompt, Record, Tokenizer
from finetune.errors import UserError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

CHAT_SHAPES: dict[str, list[str]] = {
    "messages": ["messages"],
    "conversations": ["conversations"],
    "prompt": ["prompt", "completion"],
    "instruction": ["instruction", "output"],
}
"""Shape -> the columns it needs."""


class ChatFormat:
    """Records become conversations, and conversations become examples.

    `shape` is one of CHAT_SHAPES. It is used for a record whose columns fit several shapes or none;
    any other record is read in the shape that fits.
    `columns` maps what this format calls a column to what the data calls it.
    `targets` is "assistant" (the assistant's turns with their end mark) or "all".
    `system_prompt` is put before conversations that have no system message.
    """

    name = "chat"

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        shape: str,
        columns: Mapping[str, str],
        targets: str,
        system_prompt: str | None,
    ) -> None:
        self.template = ChatTemplate(tokenizer)
        self.columns = columns
        self.targets = targets
        self.system_prompt = system_prompt
        self.shape = shape

    def messages(self, record: Record) -> list[Message]:
        """Return the record's conversation, checked, up to its last assistant turn.

        What follows that turn teaches nothing.
        """
        messages = _READERS[self._shape_of(record)](record, self.columns)
        _check_order(messages)
        while messages[-1]["role"] != "assistant":
            messages.pop()
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def _shape_of(self, record: Record) -> str:
        """Return the record's shape, which may differ between sources and within a JSON file.

        There the columns of other records are None.
        """
        given = {name for name, value in record.items() if value is not None}
        fitting = [
            shape
            for shape, needed in CHAT_SHAPES.items()
            if all(self.columns.get(name, name) in given for name in needed)
        ]
        return self.shape if self.shape in fitting or not fitting else fitting[0]

    def examples(self, record: Record) -> list[Example]:
        return self.template.examples(self.messages(record), targets=self.targets)

    def prompts(self, record: Record) -> list[Prompt]:
        """Return the conversation up to its last assistant turn; that turn is the reference."""
        *before, answer = self.messages(record)
        return [Prompt(self.template.prompt(before), before[-1]["content"], answer["content"])]


def as_messages(value: Any) -> list[Message]:
    """Return messages in OpenAI's or ShareGPT's shape as {"role", "content"}.

    Raises UserError for anything else.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"a conversation is a list of messages, not {value!r:.80}")
    return [_as_message(item, number) for number, item in enumerate(value, start=1)]


def _as_message(item: Any, number: int) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(
            f"message {number} must be an object with role and content, not {item!r:.80}"
        )
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if role not in ROLES:
        raise UserError(
            f"message {number} has the unknown role {role!r}; known are {', '.join(ROLES)}"
        )
    if not isinstance(content, str):
        raise UserError(
            f"the content of message {number} ({role}) must be text, not {content!r:.80}"
        )
    return {"role": ROLES[role], "content": content}


def _check_order(messages: list[Message]) -> None:
    """Raise UserError unless user and assistant alternate, after an optional system message.

    User and assistant messages must not be empty.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            "the conversation has no assistant turn, so there is nothing to learn from it"
        )
    first = 1 if messages[0]["role"] == "system" else 0
    for i, message in enumerate(messages[first:]):
        number, expected = first + i + 1, ("user", "assistant")[i % 2]
        if message["role"] != expected:
            after = f"after {messages[number - 2]['role']}" if number > 1 else "at the start"
            raise UserError(
                f"roles out of order: message {number} is from {message['role']} {after}, but must "
                f"be from {expected}; user and assistant take turns, after an optional system "
                "message"
            )
        if not message["content"].strip():
            raise UserError(f"message {number} ({message['role']}) is empty")


def _from_messages(record: Record, columns: Mapping[str, str]) -> list[Message]:
    return as_messages(column(record, "messages", columns))


def _from_conversations(record: Record, columns: Mapping[str, str]) -> list[Message]:
    return as_messages(column(record, "conversations", columns))


def _from_prompt(record: Record, columns: Mapping[str, str]) -> list[Message]:
    prompt, completion = column(record, "prompt", columns), column(record, "completion", columns)
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return as_messages(prompt) + as_messages(completion)


def _from_instruction(record: Record, columns: Mapping[str, str]) -> list[Message]:
    question = text_column(record, "instruction", columns)
    if (columns.get("input", "input")) in record and (
        context := text_column(record, "input", columns)
    ).strip():
        question = f"{question}\n\n{context}"
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text_column(record, "output", columns)},
    ]


_READERS: dict[str, Callable[[Record, Mapping[str, str]], list[Message]]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "prompt": _from_prompt,
    "instruction": _from_instruction,
}
