"""Whether a chat template writes what a record says: found by changing it and rendering again.

It is tried on the first record that says a thing. A record for which the template itself fails is
no measure: it is a bad record for the reason that the template gives.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.data.formats.rendering import ChatTemplate, Dialog
from finetune.data.types import Message
from finetune.errors import UserError

_MARK = "Zwqx"
_MARKED = re.compile(rf"{_MARK}(\d+)(?={_MARK})")
_ALWAYS = ("user", "assistant")  # every template writes their texts
_FIRST = ("system", "developer")  # many templates write them in front alone
_NOT_OPTIONS = ("messages", "tools", "add_generation_prompt")  # variables that are given anyway
_SWITCHES = {
    **dict.fromkeys(("yes", "on", "true", "1", 1), True),
    **dict.fromkeys(("no", "off", "false", "0", 0), False),
}
"""What is not true or false, but meant so -> what is meant."""


_EXAMPLE = Dialog([{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes"}])


class Written:
    """What `template` writes of conversations, as far as it was asked for.

    `whole`: whether the whole conversation is learnt as one text, and not each answer after its
    prompt. `each`: whether every text is looked for, and not the first of its kind.
    """

    def __init__(self, template: ChatTemplate, *, whole: bool, each: bool = False) -> None:
        self.template, self.whole, self.each = template, whole, each
        self._known: dict[tuple[object, ...], bool] = {}

    def state(self) -> list[tuple[tuple[object, ...], bool]]:
        """Return what is known so far."""
        return sorted(self._known.items(), key=repr)

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Know what was known."""
        self._known = {tuple(what): known for what, known in state}

    def role(self, role: str) -> bool:
        """Return whether the template writes a message of this role as given."""
        if ("writes", role) not in self._known:
            self._known["writes", role] = self.template.writes(role)
        return self._known["writes", role]

    def unused(self, dialog: Dialog) -> set[str]:
        """Return the texts and numbers in messages that the template leaves out, such as an id.

        Raises UserError if it leaves out anything else: tools, an option, a role, thoughts, a call.
        """
        is_plain = not (self.each or dialog.tools or dialog.options)
        if is_plain and all(len(m) == 2 and m["role"] in _ALWAYS for m in dialog.messages):
            return set()
        _require_names(dialog.options, "chat_template_kwargs")
        self._require_tools(dialog)
        self._require_options(dialog)
        self._require_roles(dialog)
        found = set()
        for place in range(len(dialog.messages)):
            found |= self._unwritten_keys(dialog, place)
        return found

    def _require_tools(self, dialog: Dialog) -> None:
        tools = list(dialog.tools or ())
        for number in range(min(2, len(tools))):  # the later ones are like the second
            fewer = replace(dialog, tools=[*tools[:number], *tools[number + 1 :]] or None)
            if not self._matters(("tools", number > 0), dialog, fewer):
                more = " more than one of the" if number else ""
                raise UserError(
                    f"the chat template does not write{more} tools. Use a template that does, or "
                    "leave the column out"
                )

    def _require_options(self, dialog: Dialog) -> None:
        for key, value in dialog.options.items():
            others = [{k: v for k, v in dialog.options.items() if k != key}]
            others += [{**dialog.options, key: other} for other in _others(value)]
            without = [replace(dialog, options=options) for options in others]
            named = not isinstance(value, bool) and self.template.names(key)
            if not (named or self._matters(("chat_template_kwargs", key), dialog, *without)):
                raise UserError(
                    f"the chat template does not use {key!r} of chat_template_kwargs. Leave it out"
                )
            what = "switch", key, value
            if _meant(value) is not None and what not in self._known:
                _require_switch(self.with_option(dialog, key), key, value, "chat_template_kwargs")
                self._known[what] = True

    def with_option(self, dialog: Dialog, key: str) -> Callable[[Any], object]:
        """Return a function that renders the conversation with another value of an option."""
        return lambda value: self._changed(replace(dialog, options={**dialog.options, key: value}))

    def _require_roles(self, dialog: Dialog) -> None:
        found = self._found(dialog) if self.each else None
        before = None  # the role of the message before: some templates write the first one alone
        for place, message in enumerate(dialog.messages):
            role, calls = message["role"], bool(message.get("tool_calls"))
            what, before = ("text", role, calls, before), role
            is_plain = role == "user" or (role == "assistant" and not calls)
            is_there = is_plain if found is None else place in found
            if is_there or not message["content"].strip():
                continue
            if not self._message_matters(what, dialog, place, {**message, "content": _MARK}):
                said = "the text beside a call" if calls else f"messages of the role {role}"
                later = " after the first message" * (place > 0 and role in _FIRST)
                raise UserError(
                    f"the chat template leaves out {said}{later}. Use a template that writes it "
                    "(model.chat_template), or remove it"
                )

    def _found(self, dialog: Dialog) -> set[int] | None:
        """Return the places whose texts the template writes, as seen in one rendering.

        Each message says a mark of its own there. None if the template fails on that.
        """
        said = [place for place, m in enumerate(dialog.messages) if m["content"].strip()]
        marked = [dict(message) for message in dialog.messages]
        for place in said:
            marked[place]["content"] = f"{_MARK}{place}{_MARK}"
        try:
            text = self.template.render(replace(dialog, messages=marked))
        except UserError:
            return None
        there = set(map(int, _MARKED.findall(text)))
        return {place for place in said if place in there}

    def _end(self, dialog: Dialog, place: int) -> int:
        """Return how many messages are written when the one at `place` is learnt or read."""
        cut = dialog.messages[place]["role"] == "assistant" and not self.whole
        return place + 1 if cut else len(dialog.messages)

    def _unwritten_keys(self, dialog: Dialog, place: int) -> set[str]:
        unused, message = set(), dialog.messages[place]
        role = message["role"]
        for key in message.keys() - {"role", "content"}:
            left_out = [
                part
                for part, other in _changes(message, key)
                if not self._message_matters((role, key, part), dialog, place, other)
            ]
            if not left_out:
                continue
            says = key == "reasoning_content" or isinstance(message[key], bool)
            if says or not isinstance(message[key], str | int | float):
                raise UserError(
                    f"the chat template does not write {left_out[0]}{key!r} of message {place + 1} "
                    f"({role}), so it would not be learnt. Use a template that writes it "
                    "(model.chat_template), or remove the key"
                )
            unused.add(f"{key!r} of messages")
        return unused

    def _matters(self, what: tuple[object, ...], dialog: Dialog, *changed: Dialog) -> bool:
        """Return whether the template writes `what`: if any change of it changes the rendering.

        Raises UserError if the template fails on the conversation itself.
        """
        if what not in self._known:
            original = self._views(dialog)
            self._known[what] = any(self._changed(other) != original for other in changed)
        return self._known[what]

    def _message_matters(
        self, what: tuple[object, ...], dialog: Dialog, place: int, other: Message
    ) -> bool:
        """Return what `_matters` does, for a message that is changed to `other`."""
        if what not in self._known:
            end = self._end(dialog, place)
            self._matters(what, dialog.upto(end), dialog.with_message(place, other).upto(end))
        return self._known[what]

    def _views(self, dialog: Dialog) -> tuple[str, ...]:
        """Return the conversation as it is learnt from: the whole, and its last answer."""
        whole = self.template.render(dialog)
        last = len(dialog.messages) - 1
        if self.whole or dialog.messages[last]["role"] != "assistant":
            return (whole,)
        try:
            turn = self.template.turn(dialog, last)
        except UserError:  # said when the conversation is learnt from
            return (whole,)
        return whole, turn.prompt, turn.learnt

    def _changed(self, dialog: Dialog) -> tuple[str, ...]:
        """Return the views; a template that fails on a change has read it."""
        try:
            return self._views(dialog)
        except UserError as error:
            return (str(error),)


def _changes(message: Message, key: str) -> Iterator[tuple[str, Message]]:
    """Yield (what is changed, the message with the change) for what a message says under a key.

    Calls are changed one by one, and their arguments too.
    """
    value = message[key]
    without = {name: said for name, said in message.items() if name != key}
    if key != "tool_calls":
        others = [{**message, key: other} for other in _others(value)] or [without]
        yield "", others[0]
        return
    for number, call in enumerate(value):
        before, after = value[:number], value[number + 1 :]
        which = "the later calls of " if number else ""
        yield which, {**message, key: [*before, *after]} if before or after else without
        function = call["function"]
        arguments = {**function["arguments"], _MARK: _MARK}
        other = {**call, "function": {**function, "arguments": arguments}}
        yield f"the arguments of {which}", {**message, key: [*before, other, *after]}


def _others(value: Any) -> Iterator[Any]:
    """Yield another value of the same kind, if it is a simple one."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, str):
        yield f"{_MARK} {value}"
    elif isinstance(value, int | float):
        yield value + 1


def require_options(template: ChatTemplate, options: Mapping[str, Any]) -> None:
    """Raise UserError for a variable in data.chat_template_kwargs that no template names.

    Also for one that is no option, and for a switch that is neither true nor false.
    """
    _require_names(options, "data.chat_template_kwargs")
    for key, value in options.items():
        if not template.names(key):
            raise UserError(
                f"the chat template does not use {key!r} of data.chat_template_kwargs. Leave it "
                "out, or write it as the template does"
            )
        if _meant(value) is not None:
            render = Written(template, whole=False).with_option(_EXAMPLE, key)
            _require_switch(render, key, value, "data.chat_template_kwargs")


def _require_names(options: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a variable that the template gets from elsewhere."""
    for key in _NOT_OPTIONS:
        if key in options:
            raise UserError(
                f"{where} has {key!r}, which the chat template gets from each record. Leave it out"
            )


def _meant(value: object) -> bool | None:
    """Return whether true or false is meant by a value that is neither; None if it is none such."""
    if isinstance(value, str):
        return _SWITCHES.get(value.strip().lower())
    return _SWITCHES.get(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _require_switch(
    render: Callable[[object], object], key: str, value: object, where: str
) -> None:
    """Raise UserError if the template reads a value as any other of its kind, but not as meant.

    `render` returns what the template writes with a value.
    """
    meant = _meant(value)
    if render(value) == render(next(_others(value))) != render(meant):
        raise UserError(
            f"{where} has {key}: {value!r}, which is no switch for the chat template. Write "
            f"{str(meant).lower()}"
        )
