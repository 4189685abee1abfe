"""Text becomes token ids and labels: a conversation through a chat template, or plain text.

**How the assistant's turns are found.** Stock chat templates do not mark which part of their output
the assistant wrote. So prefixes of the conversation are rendered. The prompt of an answer is the
rendering of the turns before it, with the generation prompt. The answer is what the rendering of
the same turns *with* the answer adds to that, up to the token at which generation stops.

If all these texts are prefixes of the rendering of the whole conversation, and so are their tokens,
the conversation is one example with several spans of targets. Some templates write earlier turns
differently once later ones follow: they strip the thoughts, or move the system message to the last
question. Then each answered turn becomes an example of its own, which is exactly what the model
sees when it is used.

Spans are found in the text and carried over to tokens (see `borders`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from finetune.data.encoding.drafts import Draft, TextEncoder
from finetune.data.formats.borders import Span, Turn, encode_text
from finetune.data.formats.control import ControlTokens, not_as_text
from finetune.data.formats.jinja import (
    missing_generation_prompt,
    names_variable,
    shared_start,
    with_date,
    with_generation_prompt,
)
from finetune.data.formats.patterns import Patterns
from finetune.data.formats.spelling import reads_text, require_texts, with_text
from finetune.data.types import Example, Message, Tokenizer
from finetune.errors import UserError

_OPENED = re.compile(r"<([\w:-]+)>\s*$")
"""The tag that a generation prompt opens for the assistant's thoughts: <think>."""


@dataclass(frozen=True, slots=True)
class Dialog:
    """A conversation, and what the template is given with it."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas
    options: Mapping[str, Any] = field(default_factory=dict)  # variables of the template
    muted: frozenset[int] = frozenset()  # places of the answers that are read, not learnt

    def upto(self, count: int) -> "Dialog":
        """Return the first `count` messages."""
        return replace(self, messages=self.messages[:count])

    def with_message(self, place: int, message: Message) -> "Dialog":
        """Return the conversation with another message at `place`."""
        messages = list(self.messages)
        messages[place] = message
        return replace(self, messages=messages)

    @property
    def answers(self) -> list[int]:
        """The places of the answers that are learnt."""
        return [
            i
            for i, message in enumerate(self.messages)
            if message["role"] == "assistant" and i not in self.muted
        ]


@dataclass(frozen=True, slots=True)
class TemplateSettings:
    """What a chat template gets with every conversation."""

    options: Mapping[str, Any] = field(default_factory=dict)  # its variables: enable_thinking
    now: datetime | None = None  # the time that it prints; None: that of each rendering


PLAIN = TemplateSettings()


class ChatTemplate:
    """Conversations through the tokenizer's chat template. Raises UserError if it has none."""

    def __init__(self, tokenizer: Tokenizer, settings: TemplateSettings = PLAIN) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template. Set model.chat_template to chatml, or to the "
                "path of a Jinja file"
            )
        self.tokenizer, self.settings = tokenizer, settings
        # Where generation may stop. "</tool_call>" of Qwen is an added token, but no special one.
        special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._ends = frozenset([*special, tokenizer.eos_token_id])
        self._templates: dict[bool, str] = {}
        self.texts = TextEncoder(tokenizer)

    def render(
        self, messages: Sequence[Message] | Dialog, *, add_generation_prompt: bool = False
    ) -> str:
        """Return the conversation as text. Raises UserError if the template fails."""
        dialog = _as_dialog(messages)
        return str(
            self._apply(
                dialog,
                self.source(with_tools=dialog.tools is not None),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )

    def _apply(self, dialog: Dialog, template: str, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                [self._spelt(message) for message in dialog.messages],
                tools=None if dialog.tools is None else list(dialog.tools),
                chat_template=template,
                **how,
                **(dict(self.settings.options) | dict(dialog.options)),
            )
        except Exception as error:  # a template is a program of the user's: it may raise anything
            if isinstance(error, ValueError) and "sanitize" in str(error):
                raise not_as_text(error) from error
            raise UserError(f"the chat template fails on this conversation: {error}") from error

    def source(self, *, with_tools: bool = False) -> str:
        """Return the template's text, with a fixed date and a generation prompt if it lacks one."""
        if with_tools not in self._templates:
            source = self.tokenizer.get_chat_template(None, [{}] if with_tools else None)
            now = self.settings.now
            dated = source if now is None else with_date(source, now)

            def render(messages: Sequence[Message], **how: Any) -> str:
                return str(self._apply(Dialog(messages), dated, tokenize=False, **how))

            self._templates[with_tools] = with_generation_prompt(
                dated, missing_generation_prompt(render)
            )
        return self._templates[with_tools]

    def names(self, variable: str) -> bool:
        """Return whether the template has a variable of this name, with tools or without."""
        return any(
            names_variable(self.source(with_tools=with_tools), variable)
            for with_tools in (False, True)
        )

    def _spelt(self, message: Message) -> Message:
        """Return a message as the template reads its calls."""
        if not message.get("tool_calls") or not self._takes_text:
            return message
        return with_text(message)

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer)  # a tokenizer with thousands of them takes a while

    @cached_property
    def _takes_text(self) -> bool:
        """Whether the template takes the arguments of calls as text."""
        source, options = self.source(), dict(self.settings.options)

        def render(messages: list[Message]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=source, tokenize=False, **options
                )
            )

        return reads_text(render)

    def writes(self, role: str) -> bool:
        """Return whether the template writes a message of this role as given.

        Gemma's template refuses system messages, others leave them out.
        """
        try:
            return "Zwqx" in self.render(
                [{"role": role, "content": "Zwqx"}, {"role": "user", "content": "a"}]
            )
        except UserError:
            return False

    def prompt(
        self, messages: Sequence[Message] | Dialog, *, parse_control_tokens: bool = True
    ) -> list[int]:
        """Return the token ids of the conversation up to the place where the assistant answers.

        `parse_control_tokens`: False reads a control token in a message or a tool as plain text.
        """
        dialog = _as_dialog(messages)
        said = [list(dialog.messages), list(dialog.tools or ())]
        if not parse_control_tokens and self._control.find_typed(said):
            how = {"return_dict": False, "sanitize_control_tokens": True}
            source = self._control.sanitizing(self.source(with_tools=dialog.tools is not None))
            return list(self._apply(dialog, source, add_generation_prompt=True, **how))
        text = self.render(dialog, add_generation_prompt=True)
        return list(encode_text(self.tokenizer, text, []).input_ids)

    def examples(self, messages: Sequence[Message] | Dialog, *, targets: str) -> list[Example]:
        """Return one example for the conversation, or one for each assistant turn (see the module).

        `targets` is "assistant" (its turns with their end mark) or "all" (every token but the
        first).
        """
        return self.texts.examples(self.drafts(messages, targets=targets))

    def drafts(self, messages: Sequence[Message] | Dialog, *, targets: str) -> list[Draft]:
        """Return what `examples` returns, before the text is encoded."""
        dialog = _as_dialog(messages)
        if targets == "all":
            filled = self._filled(dialog)
            whole = self.render(dialog) if filled is None else filled[0]
            said = [m for i, m in enumerate(dialog.messages) if i not in dialog.muted]
            require_texts(said, whole)
            return [Draft(whole, spans=self._all_but_muted(dialog, whole))]
        whole, turns = self._filled(dialog) or self._turns(dialog)
        if all(whole.startswith(turn.learnt) for turn in turns):
            # Text after the last target teaches nothing.
            return [Draft(turns[-1].learnt, turns, ends=self._ends)]
        return [Draft(turn.learnt, [turn], ends=self._ends) for turn in turns]

    def _turns(self, dialog: Dialog) -> tuple[str, list[Turn]]:
        """Return the whole conversation, and the answers that are learnt in their places."""
        whole = self.render(dialog)
        turns = [self.turn(dialog, i, whole) for i in dialog.answers]
        require_texts([m for m in dialog.messages if m["role"] == "user"], whole)
        return whole, turns

    def _filled(self, dialog: Dialog) -> tuple[str, list[Turn]] | None:
        """Return what `_turns` returns by a pattern (see `patterns`); None if there is none."""
        found = None
        if dialog.tools is None and not dialog.options:
            found = self._patterns.fill(dialog.messages)
        if found is None:
            return None
        whole, turns = found
        return whole, [turn for place, turn in turns.items() if place not in dialog.muted]

    @cached_property
    def _patterns(self) -> Patterns:
        return Patterns(self.source(), self.render, lambda m: self._turns(Dialog(m)))

    def turn(self, dialog: Dialog, index: int, whole: str | None = None) -> Turn:
        """Return the answer messages[index] in its place, after its prompt.

        `whole` is the rendering of the whole conversation, if it is known.
        Raises UserError if the template does not write it there.
        """
        prompt = self.render(dialog.upto(index), add_generation_prompt=True)
        is_last = index + 1 == len(dialog.messages)
        text = whole if whole is not None and is_last else self.render(dialog.upto(index + 1))
        if not text.startswith(prompt):
            text = _with_thoughts(prompt, text, dialog.messages[index]) or ""
        if not text:
            raise UserError(
                "the chat template cannot be split before an answer: it asks the model to continue "
                f"after {prompt[-40:]!r}, but the same turns with the answer do not begin like "
                "that. Give another template (model.chat_template), or set data.targets to all"
            )
        after, closing = self._closing
        # Nothing is learnt of what follows the end mark: generation has stopped by then.
        if closing and text.endswith(after):
            content_end = len(text) - len(after)
            end = content_end + len(closing)
        else:
            content_end = end = len(text.rstrip())
        if not text[len(prompt) : content_end].strip():
            raise UserError(
                "the chat template leaves out the assistant's answer "
                f"{str(dialog.messages[index].get('content'))[:60]!r}"
            )
        require_texts([dialog.messages[index]], text[len(prompt) :])
        return Turn(prompt, text, end, content_end)

    @cached_property
    def _closing(self) -> tuple[str, str]:
        """What the template writes after an answer, and that up to its first special token.

        Both are empty if the template fails on a question and an answer.
        """
        question = {"role": "user", "content": "Is it?"}
        try:
            backwards = [
                self.render([question, {"role": "assistant", "content": word}])[::-1]
                for word in ("Yes", "No")
            ]
        except UserError:
            return "", ""
        after = shared_start(*backwards)[::-1]
        marks = [mark for mark in self.tokenizer.get_added_vocab() if mark.strip()]
        found = [(after.index(mark), -len(mark)) for mark in marks if mark in after]
        place, length = min(found, default=(0, 0))
        return after, after[: place - length]

    def _all_but_muted(self, dialog: Dialog, whole: str) -> list[Span]:
        """Return the spans of the whole text without the answers that are not learnt."""
        spans, start = [], 0
        for index in sorted(dialog.muted):
            turn = self.turn(dialog, index)
            if not whole.startswith(turn.learnt):
                raise UserError(
                    "the chat template writes an earlier answer differently once others follow, so "
                    "it cannot be left out of data.targets: all. Set data.targets to assistant"
                )
            spans.append((start, len(turn.prompt)))
            start = turn.end
        return [*spans, (start, len(whole))]


def _as_dialog(messages: Sequence[Message] | Dialog) -> Dialog:
    return messages if isinstance(messages, Dialog) else Dialog(messages)


def _with_thoughts(prompt: str, text: str, answer: Message) -> str | None:
    """Return `prompt` and the answer after it, if the prompt opens the assistant's thoughts.

    DeepSeek-R1's template asks the model to go on after <think>, and leaves thoughts out of
    finished turns. Here the thoughts of the answer come first; an answer without any has empty
    ones. None for any other template. `text` is the template's own rendering of the turn.
    """
    opened = _OPENED.search(prompt)
    if opened is None or not text.startswith(prompt[: opened.start()]):
        return None
    close = f"</{opened[1]}>"
    thoughts, content = answer.get("reasoning_content"), str(answer.get("content") or "")
    if thoughts is None and close in content:
        thoughts = content.split(close)[0].split(f"<{opened[1]}>")[-1]
    rest = text[opened.start() :].split(close, 1)[-1].lstrip("\n")
    return f"{prompt}{(thoughts or '').strip(chr(10))}\n{close}\n\n{rest}"


class PlainText:
    """Text without a chat template: prompt, answer, EOS.

    BOS comes first if the tokenizer itself begins with it. A text that has its own BOS or EOS gets
    no second one. White space at the end of a prompt
    belongs to the answer, in training and in use: most tokenizers join a blank with the word after
    it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-text token, so a model would never stop. Set "
                "model.chat_template to chatml"
            )
        self.tokenizer = tokenizer
        self._bos = first_tokens(tokenizer)
        self._eos = [tokenizer.eos_token_id]
        self._own = tokenizer.decode(self._bos) if self._bos else None, tokenizer.decode(self._eos)
        self.texts = TextEncoder(tokenizer)

    def prompt(self, prompt: str) -> list[int]:
        """Return the token ids to generate from, with which `example` begins."""
        return [*self._first(prompt), *encode_text(self.tokenizer, prompt.rstrip(), []).input_ids]

    def _first(self, text: str) -> list[int]:
        own = self._own[0]
        return [] if own is not None and text.startswith(own) else self._bos

    def example(self, prompt: str, answer: str, *, targets: str) -> Example:
        """Return prompt and answer as an example.

        `targets` is "assistant" (the answer and EOS) or "all" (every token but the first).
        """
        return self.texts.examples([self.draft(prompt, answer, targets=targets)])[0]

    def draft(self, prompt: str, answer: str, *, targets: str) -> Draft:
        """Return what `example` returns, before the text is encoded."""
        text, is_all = prompt + answer, targets == "all"
        turns = [Turn(prompt.rstrip(), text, len(text))]
        last = [] if text.endswith(self._own[1]) else self._eos
        return Draft(text, turns, first=self._first(text), last=last, is_all_learnt=is_all)


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return [BOS] if the tokenizer itself begins a text with it, else nothing."""
    first = list(tokenizer("a", add_special_tokens=True)["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []
