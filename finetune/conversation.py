"""A chat with a model: the turns so far, and the next answer as it comes.

Floor 3. Knows no terminal: a command line or a server prints what it yields.
"""

from collections.abc import Callable, Iterator
from typing import Any, Unpack

from finetune.data.formats.rendering import ChatTemplate
from finetune.data.types import Message, Tokenizer
from finetune.errors import UserError
from finetune.generation import SamplingSettings, context_length, stream


class Conversation:
    """One conversation with `model` (a transformers causal language model on its device).

    `turns` holds the questions and answers so far. When they outgrow the model's context, the oldest pair goes, and `notify` is
    told in a sentence. Raises UserError where the tokenizer has no chat template, or one that cannot hold the system prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        system_prompt: str | None,
        notify: Callable[[str], None],
        **settings: Unpack[SamplingSettings],
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "this model has no chat template, so it knows no turns: for a model that continues text use `finetune generate`, "
                "for one trained to translate `finetune translate`"
            )
        self.model, self.tokenizer, self.settings, self.notify = model, tokenizer, settings, notify
        self.template = ChatTemplate(tokenizer)
        if system_prompt is not None and not self.template.writes_system_messages():
            raise UserError("the chat template of this model takes no system prompt: leave it out")
        self._system: list[Message] = (
            [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        )
        self.turns: list[Message] = []

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns = []

    def reply(self, text: str) -> Iterator[str]:
        """Yield the answer to `text` in pieces. An answer that is broken off stays in the conversation as far as it came.

        Raises UserError, with the conversation as it was, where `text` alone is too long for the model.
        """
        question: Message = {"role": "user", "content": text}
        prompt, self.turns = self._fit(question)
        pieces: list[str] = []
        try:
            for piece in stream(self.model, self.tokenizer, prompt, **self.settings):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.turns = [
                    *self.turns,
                    question,
                    {"role": "assistant", "content": "".join(pieces)},
                ]

    def _fit(self, question: Message) -> tuple[list[int], list[Message]]:
        """Return the prompt for `question`, and as many of the newest turns as fit with it and an answer."""
        limit = context_length(self.model)
        turns = self.turns
        while True:
            prompt = self.template.prompt([*self._system, *turns, question])
            if (
                limit is None
                or len(prompt) + min(self.settings["max_new_tokens"], limit // 2) <= limit
            ):
                break
            if not turns:
                raise UserError(
                    f"the message makes a prompt of {len(prompt)} tokens; the model reads {limit}, and some of them are for the "
                    "answer: shorten it"
                )
            turns = turns[2:]
        if dropped := (len(self.turns) - len(turns)) // 2:
            self.notify(
                f"the conversation is longer than the model's {limit} tokens: the oldest {_pairs(dropped)} left out"
            )
        return prompt, turns


def _pairs(count: int) -> str:
    return (
        "question and its answer are" if count == 1 else f"{count} questions and their answers are"
    )
