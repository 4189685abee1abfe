"""Conversations: rows of messages, prompt and completion, or instruction and output, rendered with a chat template.

Floor 1. Accepted shapes:

- `messages` (or `conversations`): a list of {"role", "content"} as OpenAI writes it, or of {"from", "value"} as ShareGPT does;
- `prompt` and `completion`, both strings or both lists of messages;
- `instruction` and `output`, with an optional `input` that goes under the instruction.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.data.formats.columns import column, text_column
from finetune.data.formats.rendering import ChatTemplate, Message, Tokenizer
from finetune.data.types import Example, Prompt, Row
from finetune.errors import UserError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

SHAPES: dict[str, list[str]] = {
    "messages": ["messages"],
    "conversations": ["conversations"],
    "prompt": ["prompt", "completion"],
    "instruction": ["instruction", "output"],
}
"""Shape -> the columns it needs."""


class ChatFormat:
    """Rows to conversations to examples.

    `shape`: one of SHAPES, that of rows whose columns fit several or none; each row is otherwise read in the shape that it has.
    `columns`: what this format calls a column -> what the data calls it.
    `targets`: "assistant" (the assistant's turns with their end mark) or "all".
    `system_prompt`: put before conversations that have no system message.
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

    def messages(self, row: Row) -> list[Message]:
        """The row's conversation up to its last assistant turn (what follows it teaches nothing), checked."""
        messages = _READERS[self._shape_of(row)](row, self.columns)
        _check_order(messages)
        while messages[-1]["role"] != "assistant":
            messages.pop()
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def _shape_of(self, row: Row) -> str:
        """Sources may differ in it, and so may the rows of a JSON file, where columns of other rows are then None."""
        there = {name for name, value in row.items() if value is not None}
        fitting = [
            shape
            for shape, needed in SHAPES.items()
            if all(self.columns.get(name, name) in there for name in needed)
        ]
        return self.shape if self.shape in fitting or not fitting else fitting[0]

    def examples(self, row: Row) -> list[Example]:
        return self.template.examples(self.messages(row), targets=self.targets)

    def prompts(self, row: Row) -> list[Prompt]:
        """The conversation up to its last assistant turn, and that turn as the reference."""
        *before, answer = self.messages(row)
        return [Prompt(self.template.prompt(before), before[-1]["content"], answer["content"])]


def as_messages(value: Any) -> list[Message]:
    """Messages in OpenAI's or ShareGPT's shape as {"role", "content"}. Raises UserError for anything else."""
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
            f"message {number} ({role}) has no text as its content, but {content!r:.80}"
        )
    return {"role": ROLES[role], "content": content}


def _check_order(messages: list[Message]) -> None:
    """Raise UserError unless the turns are: system (or not), then user and assistant in turn; none of these two empty."""
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
                f"roles out of order: message {number} is from {message['role']} {after}, where {expected} should be; the order is "
                "system (or none), then user and assistant in turn"
            )
        if not message["content"].strip():
            raise UserError(f"message {number} ({message['role']}) is empty")


def _from_messages(row: Row, columns: Mapping[str, str]) -> list[Message]:
    return as_messages(column(row, "messages", columns))


def _from_conversations(row: Row, columns: Mapping[str, str]) -> list[Message]:
    return as_messages(column(row, "conversations", columns))


def _from_prompt(row: Row, columns: Mapping[str, str]) -> list[Message]:
    prompt, completion = column(row, "prompt", columns), column(row, "completion", columns)
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return as_messages(prompt) + as_messages(completion)


def _from_instruction(row: Row, columns: Mapping[str, str]) -> list[Message]:
    question = text_column(row, "instruction", columns)
    if (columns.get("input", "input")) in row and (
        context := text_column(row, "input", columns)
    ).strip():
        question = f"{question}\n\n{context}"
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text_column(row, "output", columns)},
    ]


_READERS: dict[str, Callable[[Row, Mapping[str, str]], list[Message]]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "prompt": _from_prompt,
    "instruction": _from_instruction,
}
