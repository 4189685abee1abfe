"""A chat with a model: the turns so far, and the next answer as it comes.

It knows no terminal: a command line or a server prints what it yields.
"""

from collections.abc import Callable, Iterator

from finetune.data.formats.rendering import PLAIN, ChatTemplate, TemplateSettings
from finetune.data.types import Message, Tokenizer
from finetune.errors import UserError
from finetune.inference.beginnings import KeptCache
from finetune.inference.generation import GenerationSettings, stream
from finetune.models.describe import CausalLM, context_length


class Conversation:
    """One conversation with `model`, which is on its device.

    `template` has what the chat template gets with each prompt.
    A control token that a question spells out, such as <|im_end|>, is plain text.
    `turns` holds the questions and answers so far. When they outgrow the model's context, the
    oldest pair is left out of the prompt, and `notify` gets a sentence about it. Raises UserError
    if the tokenizer has no chat template, or one that cannot hold the system prompt.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        settings: GenerationSettings,
        template: TemplateSettings = PLAIN,
        system_prompt: str | None,
        notify: Callable[[str], None],
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "this model has no chat template, so it knows no turns. Use `finetune generate` to "
                "continue a text, or `finetune translate` for a model that was trained to translate"
            )
        self.model, self.tokenizer, self.settings, self.notify = model, tokenizer, settings, notify
        self.template = ChatTemplate(tokenizer, template)
        self._require_system(system_prompt)
        self.system_prompt = system_prompt
        self.turns: list[Message] = []
        self._left_out = 0  # of the turns, from the first: the prompt begins after them
        self.num_tokens = 0  # of the newest answer
        self._kept = KeptCache()

    @property
    def messages(self) -> list[Message]:
        """The system prompt, if there is one, and the turns."""
        return [*self._system, *self.turns]

    @property
    def _system(self) -> list[Message]:
        prompt = self.system_prompt
        return [] if prompt is None else [{"role": "system", "content": prompt}]

    def set_system_prompt(self, prompt: str) -> None:
        """Change the system prompt; "" is none. Raises UserError if the template takes none."""
        self._require_system(prompt)
        self.system_prompt = prompt or None

    def _require_system(self, prompt: str | None) -> None:
        if prompt and not self.template.writes("system"):
            raise UserError("the chat template of this model takes no system prompt. Leave it out")

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns, self._left_out = [], 0

    def undo(self) -> str | None:
        """Forget the newest question and its answer; return the question, None if there is none."""
        if not self.turns:
            return None
        question: str = self.turns[-2]["content"]
        self.turns = self.turns[:-2]
        self._left_out = min(self._left_out, len(self.turns))
        return question

    def reply(self, text: str) -> Iterator[str]:
        """Yield the answer to `text` in pieces.

        The question stays in the conversation, with as much of the answer as came. Raises UserError
        if `text` alone is too long for the model; the conversation then stays as it was.
        """
        question: Message = {"role": "user", "content": text}
        prompt = self._fit(question)
        pieces: list[str] = []
        self.num_tokens, refused = 0, False
        try:
            for piece in stream(
                self.model,
                self.tokenizer,
                prompt,
                self.settings,
                on_token=self._count,
                kept=self._kept,
            ):
                pieces.append(piece)
                yield piece
        except UserError:
            refused = True
            raise
        finally:
            if pieces or not refused:
                answer: Message = {"role": "assistant", "content": "".join(pieces)}
                self.turns = [*self.turns, question, answer]

    def _count(self) -> None:
        self.num_tokens += 1

    def _fit(self, question: Message) -> list[int]:
        """Return the prompt for `question`, with the newest turns that leave room for an answer."""
        limit = context_length(self.model)
        turns = self.turns[self._left_out :]
        while True:
            prompt = self.template.prompt(
                [*self._system, *turns, question], parse_control_tokens=False
            )
            if (
                limit is None
                or len(prompt) + min(self.settings.max_new_tokens, limit // 2) <= limit
            ):
                break
            if not turns:
                raise UserError(
                    f"the message makes a prompt of {len(prompt)} tokens; the model reads {limit}, "
                    "and some of them are for the answer. Shorten the message"
                )
            turns = turns[2:]
        if dropped := (len(self.turns) - len(turns) - self._left_out) // 2:
            self._left_out += 2 * dropped
            self.notify(
                f"the conversation is longer than the model's {limit} tokens: the oldest "
                f"{_pairs(dropped)} left out"
            )
        return prompt


def _pairs(count: int) -> str:
    if count == 1:
        return "question and its answer are"
    return f"{count} questions and their answers are"
