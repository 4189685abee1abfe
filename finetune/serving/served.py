"""The models that are served: how a request becomes a prompt, and a prompt a job."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.data.formats.messages import read_messages, read_tools
from finetune.data.formats.rendering import ChatTemplate, Dialog
from finetune.data.formats.written import Written
from finetune.data.types import Message, Tokenizer
from finetune.errors import UserError
from finetune.evaluation.tool_calls import read_answer_calls, text_before_calls
from finetune.inference.decoder import GenerationSettings, answer_room
from finetune.models.describe import CausalLM
from finetune.serving.protocol import ChatRequest

Translate = Callable[[str, str | None, str | None, str | None], Sequence[int]]
"""From a sentence, its language, the one to translate to and a system prompt, to a prompt's ids."""

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

    def prompt(self, request: ChatRequest) -> list[int]:
        """Return the ids of the prompt. Raises UserError for what this model cannot be asked."""
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
        self._require_written(dialog)
        return ids

    def _require_written(self, dialog: Dialog) -> None:
        """Raise UserError if the template leaves out what the conversation says, as in training."""
        assert self.template is not None
        try:
            Written(self.template, whole=False).unused(dialog)
        except UserError as error:
            said = _OF_TRAINING.sub("", str(error).partition(". ")[0])
            raise UserError(f"{said}. Leave that out of the request") from error

    def _sentence(self, messages: Sequence[Message], request: ChatRequest) -> list[int]:
        assert request.translate is not None
        if request.tools:
            raise UserError("translate takes no tools. Leave out tools")
        if self.translate is None:
            raise UserError("this model was not trained to translate. Leave out translate")
        *before, last = messages
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["system", "user"]):
            raise UserError(
                "translate takes the sentence as one message from the user, after a system message "
                f"or none, and not {', '.join(roles)}"
            )
        system = before[0]["content"] if before else None
        direction = request.translate
        text = last["content"].strip()
        return list(self.translate(text, direction.source, direction.target, system))

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

    def drawing(self, request: ChatRequest, prompt: Sequence[int]) -> GenerationSettings:
        """Return the settings of the answer. Raises UserError if the prompt leaves no room."""
        settings = replace(self.settings, **request.drawing())
        answer_room(self.model, prompt, settings.max_new_tokens)
        return settings

    def calls(self, prompt: Sequence[int], answer: Sequence[int]) -> list[dict[str, object]] | None:
        """Return the calls of tools in an answer, or None if there are none to be read."""
        return read_answer_calls(self.tokenizer, answer, prompt=prompt)

    def text_before_calls(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """Return what an answer that calls tools says before its first call."""
        return text_before_calls(self.tokenizer, answer, prompt=prompt)


@dataclass(frozen=True)
class Served:
    """All that is served."""

    models: Mapping[str, ServedModel]  # by the name that a request gives
    about: Mapping[str, Any] = field(default_factory=dict)  # what the page shows, for JSON
    report: Path | None = None  # the run's report.html
