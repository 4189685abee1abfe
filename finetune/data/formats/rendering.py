"""From text to token ids and labels: a conversation through a chat template, or a prompt and its answer as plain text.

Floor 1: the tokenizer comes in as a plain object.

**Where the assistant's turns are.** Stock chat templates do not say which part of their output the assistant wrote, so it is
found by rendering prefixes. What a model is given when it is to answer is the rendering of the turns before, with the
generation prompt; what it should answer is whatever the rendering of the same turns *with* the answer has beyond that. Where
all these renderings are prefixes of the rendering of the whole conversation, the conversation is one example with several spans
of targets. Where a template writes earlier turns differently once later ones follow (it strips their thoughts, or moves the
system message to the last question), each answered turn becomes an example of its own, which is exactly what the model meets
when it is used.

Spans are found on the text and carried over to tokens by the tokenizer's character offsets, because tokens do not concatenate:
a SentencePiece tokenizer writes another first token for "answer" alone than for "answer" after a prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from finetune.data.types import IGNORE_INDEX, Example
from finetune.errors import UserError

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

Span = tuple[int, int]
"""Characters [start, end) of a text."""


class Tokenizer(Protocol):
    """What the data path needs of a (fast) Hugging Face tokenizer."""

    is_fast: bool
    chat_template: Any
    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Any: ...

    def __len__(self) -> int: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def decode(self, token_ids: Any, **options: Any) -> Any: ...

    def get_added_vocab(self) -> Mapping[str, int]: ...


class ChatTemplate:
    """Conversations through the tokenizer's chat template. Raises UserError where there is none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                'the tokenizer has no chat template; set model.chat_template: "chatml", or the path of a Jinja file'
            )
        self.tokenizer = tokenizer
        self._marks = frozenset(tokenizer.get_added_vocab().values())

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it. Raises UserError where the template refuses it."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of the user's: it may raise anything
            raise UserError(f"the chat template fails on this conversation: {error}") from error
        return str(text)

    def writes_system_messages(self) -> bool:
        """Whether a system message is written as given (Gemma's template refuses it, others leave it out)."""
        try:
            return "Zwqx" in self.render(
                [{"role": "system", "content": "Zwqx"}, {"role": "user", "content": "a"}]
            )
        except UserError:
            return False

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation up to where the assistant is to answer."""
        return list(
            encode_text(
                self.tokenizer, self.render(messages, add_generation_prompt=True), []
            ).input_ids
        )

    def examples(self, messages: Sequence[Message], *, targets: str) -> list[Example]:
        """One example for the conversation, or one for each assistant turn (see the module's text).

        `targets`: "assistant" (its turns with their end mark) or "all" (every token but the first).
        """
        whole = self.render(messages)
        if targets == "all":
            return [encode_text(self.tokenizer, whole, [(0, len(whole))])]
        turns = [
            self._answer(messages, i, whole)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        if all(whole.startswith(text) for text, _ in turns):
            turns = [(whole, [span for _, spans in turns for span in spans])]
        return [
            self._example(text[: spans[-1][1]], spans) for text, spans in turns
        ]  # what follows the last target teaches nothing

    def _answer(
        self, messages: Sequence[Message], index: int, whole: str
    ) -> tuple[str, list[Span]]:
        """The text up to the end of the assistant turn messages[index], and the span of that turn in it."""
        prompt = self.render(messages[:index], add_generation_prompt=True)
        text = whole if index + 1 == len(messages) else self.render(messages[: index + 1])
        if not text.startswith(prompt):
            raise UserError(
                f"the chat template cannot be split before an answer: it asks the model to go on from {prompt[-40:]!r}, but the "
                "same turns with the answer do not begin like that; give another (model.chat_template), or set data.targets: all"
            )
        end = len(
            text.rstrip()
        )  # the line break after the end mark is nothing to learn: generation has stopped by then
        if end <= len(prompt):
            raise UserError(
                f"the chat template leaves out the assistant's answer {messages[index]['content'][:60]!r}"
            )
        return text, [(len(prompt), end)]

    def _example(self, text: str, spans: list[Span]) -> Example:
        """Encode, and raise UserError if a turn does not end in a token of its own: a model trained so would never stop."""
        example = encode_text(self.tokenizer, text, spans)
        following = [*example.labels[1:], IGNORE_INDEX]
        ends = [
            a for a, b in zip(example.labels, following) if a != IGNORE_INDEX and b == IGNORE_INDEX
        ]
        if not self._marks.issuperset(ends):
            raise UserError(
                f"the chat template ends the assistant's turn with {text[-40:]!r}, which is no special token, so a model trained "
                'with it would never stop; give a template that writes one (model.chat_template: "chatml")'
            )
        return example


class PlainText:
    """Text without a chat template: (BOS where the tokenizer itself begins with it) prompt, answer, EOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                'the tokenizer has no end-of-text token, so a model would never stop; set model.chat_template: "chatml"'
            )
        self.tokenizer = tokenizer
        first = list(tokenizer("a", add_special_tokens=True)["input_ids"])[:1]
        self._bos = first if first == [tokenizer.bos_token_id] else []
        self._eos = [tokenizer.eos_token_id]

    def prompt(self, prompt: str) -> list[int]:
        """Token ids to generate from: what `example` begins with."""
        return [*self._bos, *encode_text(self.tokenizer, prompt, []).input_ids]

    def example(self, prompt: str, answer: str, *, targets: str) -> Example:
        """Learnt are the answer and EOS ("assistant"), or every token but the first ("all")."""
        body = encode_text(
            self.tokenizer, prompt + answer, [(len(prompt), len(prompt) + len(answer))]
        )
        ids = [*self._bos, *body.input_ids, *self._eos]
        labels = (
            ids
            if targets == "all"
            else [*[IGNORE_INDEX] * len(self._bos), *body.labels, *self._eos]
        )
        return Example(ids, [IGNORE_INDEX, *labels[1:]])


def encode_text(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> Example:
    """Token ids of `text` as it stands (nothing added: a template writes its own BOS), with the characters in `spans` as targets.

    A token that lies across the start of a span belongs to it. `spans` are in order and do not overlap.
    """
    assert tokenizer.is_fast, "a tokenizer without character offsets"
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoding["input_ids"])
    labels = [IGNORE_INDEX] * len(ids)
    remaining = iter(spans)
    span = next(remaining, None)
    for i, (start, end) in enumerate(encoding["offset_mapping"]):
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        if end > span[0]:
            labels[i] = ids[i]
    if labels:
        labels[0] = IGNORE_INDEX
    if not ids:
        raise UserError("the text is empty")
    return Example(ids, labels)
