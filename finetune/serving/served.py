"""The models that are served: how a request becomes a prompt, and a prompt a job."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.data.formats.languages import language_tag, require_name
from finetune.data.formats.messages import SWITCHES, read_messages, read_tools
from finetune.data.formats.rendering import ChatTemplate, Dialog
from finetune.data.formats.written import Written
from finetune.data.types import Message, Tokenizer
from finetune.errors import UserError
from finetune.evaluation.tool_calls import read_answer_calls, text_beside_calls
from finetune.inference.decoder import GenerationSettings, answer_room
from finetune.models.describe import CausalLM
from finetune.serving.protocol import ChatRequest, Direction

Translate = Callable[[str, str | None, str | None, str | None], Sequence[int]]
"""From a sentence, its language, the one to translate to and a system prompt, to a prompt's ids."""

UNUSED = ("name", "id", "tool_call_id")
"""What messages may say though the template does not write it: it only tells them apart."""

_OF_TRAINING = re.compile(r" of message \d+|, so it would not be learnt")
"""What a sentence about a record says that does not fit a request."""


@dataclass(frozen=True)
class ServedModel:
    """One model, and how it is asked.

    `system_prompt` is that of the run's training. It comes before a conversation that has none.
    """

    model: CausalLM
    tokenizer: Tokenizer
    settings: GenerationSettings  # unless a request says otherwise
    template: ChatTemplate | None  # None: it knows no turns
    system_prompt: str | None = None
    translate: Translate | None = None  # None: the run was not one of translation
    directions: Sequence[tuple[str, str]] = ()  # that the run learnt to translate in

    def prompt(self, request: ChatRequest) -> list[int]:
        """Return the ids of the prompt; none for an empty sentence, which needs no answer.

        Raises UserError for what this model cannot be asked, and if there is no room to answer.
        """
        _require_no_switch(request.messages)
        messages, _ = read_messages(request.messages)
        if request.translate is not None:
            return self._sentence(messages, request)
        if self.template is None:
            raise UserError(
                "this model has no chat template, so it knows no turns; a translation run takes "
                'a sentence with "translate": {}'
            )
        if messages[-1]["role"] not in ("user", "tool"):
            raise UserError(
                f"the last message is from {messages[-1]['role']}, but must be from user or tool"
            )
        tools = None if request.tool_choice == "none" else read_tools(request.tools)
        dialog = Dialog(self._with_system_prompt(messages), tools=tools)
        ids = self.template.prompt(dialog, parse_control_tokens=False)
        answer_room(self.model, ids, 1)  # what is too long is not looked at further
        self._require_written(dialog)
        return ids

    def _require_written(self, dialog: Dialog) -> None:
        """Raise UserError if the template leaves out what the conversation says, as in training."""
        assert self.template is not None
        try:
            unused = Written(self.template, whole=False, each=True).unused(dialog)
        except UserError as error:
            said = _OF_TRAINING.sub("", str(error).partition(". ")[0])
            raise UserError(f"{said}. Leave that out of the request") from error
        if left_out := unused - {f"{key!r} of messages" for key in UNUSED}:
            raise UserError(
                f"the chat template does not write {min(left_out)}. Leave that out of the request"
            )

    def _sentence(self, messages: Sequence[Message], request: ChatRequest) -> list[int]:
        assert request.translate is not None
        if request.tools:
            raise UserError("translate takes no tools. Leave out tools")
        if self.translate is None:
            raise UserError("this model was not trained to translate. Leave out translate")
        for message in messages:
            if more := message.keys() - {"role", "content", *UNUSED}:
                raise UserError(
                    f"translate takes texts alone, and a message has {min(more)!r}. Leave it out"
                )
        *before, last = messages
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["system", "user"], ["developer", "user"]):
            raise UserError(
                "translate takes the sentence as one message from the user, after a system message "
                f"or none, and not {', '.join(roles)}"
            )
        system = before[0]["content"] if before else None
        source, target = self._direction(request.translate)
        text = last["content"].strip()
        if not text:
            return []
        ids = list(self.translate(text, source, target, system))
        answer_room(self.model, ids, 1)
        return ids

    def _direction(self, asked: Direction) -> tuple[str | None, str | None]:
        """Return the languages to translate from and to, as the run names them.

        Raises UserError for those that the run did not learn.
        """
        given = (asked.source, asked.target)
        for name, language in zip(("from", "to"), given):
            if language is not None:
                require_name(language, f"translate.{name}")
        if not self.directions:
            return given
        for direction in self.directions:
            if all(
                language is None or language_tag(language) == language_tag(own)
                for language, own in zip(given, direction)
            ):
                return direction
        source, target = self.directions[0]
        wanted = (asked.source or source, asked.target or target)
        learnt = " and ".join(" → ".join(direction) for direction in self.directions)
        if language_tag(wanted[0]) == language_tag(wanted[1]):
            raise UserError(
                f"translate goes from {wanted[0]} to {wanted[1]}, which are one language; this run "
                f"learnt {learnt}. Give two languages, or leave them out"
            )
        raise UserError(
            f"this run learnt {learnt}, not {' → '.join(wanted)}. Ask for what it learnt"
        )

    def _with_system_prompt(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages after the run's system prompt. An empty one in front means none.

        A developer's message is a system message, as in training.
        """
        first = messages[0]
        if first["role"] in ("system", "developer"):
            if not first["content"].strip():
                return list(messages[1:])
            assert self.template is not None
            is_system = self.template.writes("system")
            return [{**first, "role": "system"} if is_system else first, *messages[1:]]
        if self.system_prompt is None:
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def drawing(self, request: ChatRequest) -> GenerationSettings:
        """Return the settings of the answer. Raises UserError if the request contradicts itself."""
        return replace(self.settings, **request.drawing())

    def calls(self, prompt: Sequence[int], answer: Sequence[int]) -> list[dict[str, object]] | None:
        """Return the calls of tools in an answer, or None if there are none to be read."""
        return read_answer_calls(self.tokenizer, answer, prompt=prompt)

    def text_beside_calls(self, prompt: Sequence[int], answer: Sequence[int], length: int) -> str:
        """Return what the first `length` characters of an answer say beside its calls of tools."""
        return text_beside_calls(self.tokenizer, answer, prompt=prompt, length=length)


def _require_no_switch(messages: Sequence[Mapping[str, object]]) -> None:
    """Raise UserError for a message that says whether it is learnt, which a record may say."""
    for number, message in enumerate(messages, start=1):
        for key in SWITCHES:
            if message.get(key) is not None:
                raise UserError(
                    f"message {number} has {key!r}, which is for training and changes no answer. "
                    "Leave it out"
                )


@dataclass(frozen=True)
class Served:
    """All that is served."""

    models: Mapping[str, ServedModel]  # by the name that a request gives
    about: Mapping[str, Any] = field(default_factory=dict)  # what the page shows, for JSON
    report: Path | None = None  # the run's report.html
