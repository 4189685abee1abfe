"""Conversations, rendered with a chat template.

Accepted shapes of a record:

- `messages` or `conversations`: a list of messages (see `messages`);
- `prompt` and `completion`: both strings or both lists of messages;
- `instruction` and `output`: with an optional `input`, which is written below the instruction.

Each may come with `system` (text), `history` (pairs of question and answer), `tools` (JSON schemas)
and `chat_template_kwargs` (variables of the template). A `kto_tag` that is false makes a bad
record. So do a `weight` of 0 and, beside `prompt` and `completion`, a false `label`.

What a record says is learnt, or the record is refused: whether the template writes something is
found by leaving it out and rendering again.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from finetune.data.encoding.drafts import Draft
from finetune.data.formats.borders import encode_text
from finetune.data.formats.columns import (
    column,
    is_something_else,
    is_switched_on,
    other_case,
    other_names,
    require_some_text,
    switches,
    text_column,
    unused_columns,
    unused_notes,
    usual_columns,
)
from finetune.data.formats.control import ControlTokens
from finetune.data.formats.messages import (
    check_order,
    conversation_text,
    from_json,
    holds_messages,
    merge_turns,
    read_messages,
    read_options,
    read_tools,
)
from finetune.data.formats.rendering import ChatTemplate, Dialog, TemplateSettings
from finetune.data.formats.written import Written, require_options
from finetune.data.types import Example, Message, Prompt, Record, Tokenizer
from finetune.errors import UserError

CHAT_SHAPES: dict[str, list[str]] = {
    "messages": ["messages"],
    "conversations": ["conversations"],
    "prompt": ["prompt", "completion"],
    "instruction": ["instruction", "output"],
}
"""Shape -> the columns it needs."""

CHAT_OPTIONAL = ["input", "context", "system", "history", "tools", "chat_template_kwargs"]
"""Columns that a shape may have as well."""

_NAMES = [*(name for needed in CHAT_SHAPES.values() for name in needed), *CHAT_OPTIONAL]


class Reading(NamedTuple):
    """How the records with the same columns are read."""

    shape: str
    columns: Mapping[str, str]  # what this format calls a column -> what these records call it
    used: frozenset[str]  # columns that are read if a record has them
    switches: tuple[str, ...] = ()  # other columns, which may say that a record is not learnt


class ChatFormat:
    """Records become conversations, and conversations become examples.

    `shape` is one of CHAT_SHAPES. It is used for a record whose columns fit several shapes or none;
    any other record is read in the shape that fits.
    `columns` maps what this format calls a column to what the first record calls it. `given` has
    those that the config says; None for all of them. Other records may have usual names instead.
    `targets` is "assistant" (the assistant's turns with their end mark) or "all".
    `system_prompt` is put before conversations that have no system message.
    `settings` are those of the chat template. `control` counts or refuses control tokens in texts.
    `merge_turns`: whether turns of one role in a row become one.
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
        settings: TemplateSettings,
        control: ControlTokens,
        merge_turns: bool = False,
        given: Mapping[str, str] | None = None,
    ) -> None:
        self.template = ChatTemplate(tokenizer, settings)
        self.texts = self.template.texts
        require_options(self.template, settings.options)
        self.control = control
        self.merge_turns = merge_turns
        self.columns = columns
        self.given = columns if given is None else given
        self.targets = targets
        self.system_prompt = system_prompt
        self.shape = shape
        self.calls_tools = False  # whether a record so far called a tool
        self._systems: set[str | None] = set()  # of examples, at most two of them
        self._written = Written(self.template, whole=targets == "all")
        self._unused: Counter[str] = Counter()  # what is not used -> records that have it
        self._reading_with = cache(self._find_reading)

    def dialog(self, record: Record) -> Dialog:
        """Return the record's conversation, checked, up to its last assistant turn.

        What follows that turn teaches nothing. Raises UserError for a conversation that is out of
        order, or says something that the template does not write.
        """
        dialog, _ = self._read(record)
        return dialog

    def _read(self, record: Record) -> tuple[Dialog, set[str]]:
        """Return the conversation, and what the record says that is not used."""
        require_some_text(record)
        reading = self._reading(record)
        columns = reading.columns
        messages, muted = self._muted_answers(*_READERS[reading.shape](record, columns))
        on = {name for name in reading.switches if is_switched_on(name, record[name])}
        unused = unused_columns(record, (reading.used | on) - _unread(record, reading))
        history = _history(record, columns)
        messages, muted = [*history, *messages], {len(history) + i for i in muted}
        has_system = columns.get("system", "system") in record
        system = text_column(record, "system", columns) if has_system else ""
        first = messages[0] if messages else {}
        if system and first != _system(system):
            if first.get("role") in ("system", "developer"):
                raise UserError("there are a column and a message with a system prompt. Keep one")
            messages, muted = [_system(system), *messages], {i + 1 for i in muted}
        if self.merge_turns:
            messages, muted = merge_turns(messages, muted)
        check_order(messages, merged=self.merge_turns)
        while messages[-1]["role"] != "assistant":
            messages.pop()
            unused.add("messages after the last answer")
        if self.system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
            messages, muted = [_system(self.system_prompt), *messages], {i + 1 for i in muted}
        if messages[0]["role"] == "developer" and self._means_system():
            messages[0] = {**messages[0], "role": "system"}
        self.calls_tools |= any("tool_calls" in message for message in messages)
        tools = read_tools(_optional(record, "tools", columns))
        options = read_options(_optional(record, "chat_template_kwargs", columns))
        dialog = Dialog(messages, tools, options, frozenset(muted))
        self._require_answer(dialog)
        own = self.template.settings.options
        unused |= {
            f"the records' {key!r} in chat and generate, which take data.chat_template_kwargs"
            for key, value in options.items()
            if key not in own or own[key] != value
        }
        return dialog, unused | self._written.unused(dialog)

    def _muted_answers(self, messages: list[Message], muted: set[int]) -> "Read":
        """Return the messages and the answers that are not learnt.

        Raises UserError for another turn that is switched off, if every turn is learnt.
        """
        for place in sorted(muted):
            role = messages[place]["role"]
            if role != "assistant" and self.targets == "all":
                raise UserError(
                    f"message {place + 1} ({role}) is switched off, but only answers can be left "
                    "out of data.targets=all. Remove the switch, or set data.targets=assistant"
                )
        return messages, {i for i in muted if messages[i]["role"] == "assistant"}

    def _means_system(self) -> bool:
        """Return whether a developer's message is written as a system message.

        It is OpenAI's newer name of the same, and the use knows system prompts alone.
        """
        return self._written.role("system") or not self._written.role("developer")

    def examples(self, record: Record) -> list[Example]:
        return self.texts.examples(self.drafts(record))

    def drafts(self, record: Record) -> list[Draft]:
        dialog, unused = self._read(record)
        self.control.check([*dialog.messages, dialog.tools or ()])
        self._unused.update(unused)
        if len(self._systems) < 2:
            first = dialog.messages[0]
            self._systems.add(None if first["role"] == "user" else first["content"])
        return self.template.drafts(dialog, targets=self.targets)

    def prompts(self, record: Record) -> list[Prompt]:
        """Return the conversation up to its last answer that is learnt, and up to each call.

        The answer is the reference, as the template writes it, with thoughts and calls.
        """
        dialog = self.dialog(record)
        calls = [i for i in dialog.answers if dialog.messages[i].get("tool_calls")]
        return [self._prompt(dialog, place) for place in sorted({*calls, dialog.answers[-1]})]

    def _prompt(self, dialog: Dialog, place: int) -> Prompt:
        before, answer = dialog.upto(place), dialog.messages[place]
        tokenizer, turn = self.template.tokenizer, self.template.turn(dialog, place)
        said = encode_text(tokenizer, turn.answer, []).input_ids
        return Prompt(
            self.template.prompt(before),
            conversation_text(before.messages, dialog.tools),
            tokenizer.decode(list(said), skip_special_tokens=True).strip(),
            tuple(call["function"] for call in answer.get("tool_calls", ())),
        )

    @property
    def common_system_prompt(self) -> str | None:
        """The system prompt of every conversation so far; that of the config if they differ."""
        return next(iter(self._systems)) if len(self._systems) == 1 else self.system_prompt

    def state(self) -> dict[str, Any]:
        """Return what records have changed so far, as plain values for JSON."""
        return {
            "calls_tools": self.calls_tools,
            "systems": sorted(self._systems, key=str),
            "written": self._written.state(),
            "unused": dict(self._unused),
            "control": self.control.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as after the records that led to `state`."""
        self.calls_tools, self._systems = state["calls_tools"], set(state["systems"])
        self._written.restore(state["written"])
        self._unused = Counter(state["unused"])
        self.control.restore(state["control"])

    def notes(self) -> list[str]:
        """Return a sentence for each thing that records say and that is not used.

        It is about the records whose examples were made since the last call.
        """
        unused, self._unused = self._unused, Counter()
        return unused_notes(unused) + self.control.notes()

    def _reading(self, record: Record) -> Reading:
        """Return how the record is read, which may differ between sources and within a JSON file.

        There the columns of other records are None.
        """
        filled = tuple(
            name
            for name, value in record.items()
            if value is not None and not is_something_else(name, value)
        )
        return self._reading_with(tuple(record), filled)

    def _find_reading(self, names: tuple[str, ...], filled: tuple[str, ...]) -> Reading:
        """Return how records with columns of these names are read; those `filled` have a value.

        The config's names of columns are for records that have one of these columns.
        """
        given = self.given if set(names) & set(self.given.values()) else {}
        others = {name: own for name, own in other_names(filled).items() if name not in filled}
        columns = {**others, **other_case(filled, _NAMES), **given}
        fitting = _fitting(columns, filled)
        if not fitting:
            columns = {**usual_columns(names), **columns}
            fitting = _fitting(columns, filled)
        if not fitting:
            return _reading_of(self.shape, self.columns, filled)
        shape = self.shape if self.shape in fitting else fitting[0]
        return _reading_of(shape, columns, filled)

    def _require_answer(self, dialog: Dialog) -> None:
        if not dialog.answers:
            raise UserError("no answer of the conversation is to be learnt: all are switched off")


def _fitting(columns: Mapping[str, str], filled: Container[str]) -> list[str]:
    """Return the shapes whose columns are all filled."""
    return [
        shape
        for shape, needed in CHAT_SHAPES.items()
        if all(columns.get(name, name) in filled for name in needed)
    ]


def _reading_of(shape: str, columns: Mapping[str, str], filled: Sequence[str]) -> Reading:
    names = {*CHAT_SHAPES[shape], *CHAT_OPTIONAL}
    if shape != "instruction":
        names -= {*_INPUTS}
    used = frozenset(columns.get(name, name) for name in names)
    return Reading(shape, columns, used, tuple(n for n in switches(filled) if n not in used))


def _optional(record: Record, name: str, columns: Mapping[str, str]) -> Any:
    return record.get(columns.get(name, name))


def _unread(record: Record, reading: Reading) -> set[str]:
    """Return the columns of `_INPUTS` that are not read."""
    if reading.shape != "instruction":
        return set()
    columns = reading.columns
    read = _input_of(record, columns)
    return {columns.get(name, name) for name in _INPUTS} - {columns.get(read, read)}


def _history(record: Record, columns: Mapping[str, str]) -> list[Message]:
    """Return the turns of the column `history`, pairs of question and answer."""
    name = columns.get("history", "history")
    pairs = from_json(record.get(name) or [], name)
    messages: list[Message] = []
    for pair in pairs if isinstance(pairs, list | tuple) else [None]:
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise UserError(
                f"{name} must be a list of pairs of question and answer, not {pairs!r:.80}"
            )
        messages += _question_and_answer(*pair)
    return messages


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _question_and_answer(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_INPUTS = ("input", "context")  # what an instruction is about


def _input_of(record: Record, columns: Mapping[str, str]) -> str:
    """Return which of `_INPUTS` is read: `context` if it is text and there is no input."""
    given, other = (record.get(columns.get(name, name)) for name in _INPUTS)
    is_blank = given is None or (isinstance(given, str) and not given.strip())
    return "context" if is_blank and isinstance(other, str) else "input"


Read = tuple[list[Message], set[int]]
"""Messages, and the places of the answers that are not learnt."""


def _from_messages(record: Record, columns: Mapping[str, str]) -> Read:
    return read_messages(column(record, "messages", columns))


def _from_conversations(record: Record, columns: Mapping[str, str]) -> Read:
    return read_messages(column(record, "conversations", columns))


def _from_prompt(record: Record, columns: Mapping[str, str]) -> Read:
    names = [columns.get(name, name) for name in ("prompt", "completion")]
    prompt, completion = values = [column(record, name, {}) for name in names]
    is_text = [isinstance(value, str) and not holds_messages(value) for value in values]
    if isinstance(prompt, str) and isinstance(completion, str) and any(is_text):
        return _question_and_answer(prompt, completion), set()
    for name, value in zip(names, values):
        if value is None or isinstance(value, bool | int | float):
            raise UserError(f"{name!r} must be text or a list of messages, not {value!r}")
    if any(is_text):
        other = is_text.index(False)
        raise UserError(
            f"{names[1 - other]!r} is text, but {names[other]!r} is {values[other]!r:.80}. Give "
            "both as text, or both as lists of messages"
        )
    (before, context), (after, muted) = map(_messages_in, names, values)
    return [*before, *after], context | {len(before) + i for i in muted}


def _messages_in(name: str, value: object) -> Read:
    """Return the messages of a column, which an error names."""
    try:
        return read_messages(value)
    except UserError as error:
        raise UserError(f"column {name!r}: {error}") from error


def _from_instruction(record: Record, columns: Mapping[str, str]) -> Read:
    question = text_column(record, "instruction", columns)
    name = _input_of(record, columns)
    about = text_column(record, name, columns) if columns.get(name, name) in record else ""
    question = "\n\n".join(text for text in (question, about) if text.strip())
    return _question_and_answer(question, text_column(record, "output", columns)), set()


_READERS: dict[str, Callable[[Record, Mapping[str, str]], Read]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "prompt": _from_prompt,
    "instruction": _from_instruction,
}
