"""Text becomes token ids and labels: a conversation through a chat template, or plain text.

**How the assistant's turns are found.** Stock chat templates do not mark which part of their output
the assistant wrote. So prefixes of the conversation are rendered. The prompt of an answer is the
rendering of the turns before it, with the generation prompt. The answer is what the rendering of
the same turns *with* the answer adds to that.

If all these renderings are prefixes of the rendering of the whole conversation, the conversation is
one example with several spans of targets. Some templates write earlier turns differently once later
ones follow: they strip the thoughts, or move the system message to the last question. Then each
answered turn becomes an example of its own, which is exactly what the model sees when it is used.

Spans are found in the text and carried over to tokens by the tokenizer's character offsets, because
tokens do not concatenate. A SentencePiece tokenizer, for instance, begins "answer" with another
token if it comes alone than if it comes after a prompt.
"""

from collections.abc import Sequence

from finetune.data.types import IGNORE_INDEX, Example, Message, Tokenizer
from finetune.errors import UserError

Span = tuple[int, int]
"""Characters [start, end) of a text."""


class ChatTemplate:
    """Conversations through the tokenizer's chat template. Raises UserError if it has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template. Set model.chat_template to chatml, or to the "
                "path of a Jinja file"
            )
        self.tokenizer = tokenizer
        self._marks = frozenset(tokenizer.get_added_vocab().values())

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the conversation as text. Raises UserError if the template fails."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of the user's: it may raise anything
            raise UserError(f"the chat template fails on this conversation: {error}") from error
        return str(text)

    def writes_system_messages(self) -> bool:
        """Return whether the template writes a system message as given.

        Gemma's template refuses it, others leave it out.
        """
        try:
            return "Zwqx" in self.render(
                [{"role": "system", "content": "Zwqx"}, {"role": "user", "content": "a"}]
            )
        except UserError:
            return False

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of the conversation up to the place where the assistant answers."""
        text = self.render(messages, add_generation_prompt=True)
        return list(encode_text(self.tokenizer, text, []).input_ids)

    def examples(self, messages: Sequence[Message], *, targets: str) -> list[Example]:
        """Return one example for the conversation, or one for each assistant turn (see the module).

        `targets` is "assistant" (its turns with their end mark) or "all" (every token but the
        first).
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
        # Text after the last target teaches nothing.
        return [self._example(text[: spans[-1][1]], spans) for text, spans in turns]

    def _answer(
        self, messages: Sequence[Message], index: int, whole: str
    ) -> tuple[str, list[Span]]:
        """Return the text up to the end of the turn messages[index], and the span of that turn."""
        prompt = self.render(messages[:index], add_generation_prompt=True)
        text = whole if index + 1 == len(messages) else self.render(messages[: index + 1])
        if not text.startswith(prompt):
            raise UserError(
                "the chat template cannot be split before an answer: it asks the model to continue "
                f"after {prompt[-40:]!r}, but the same turns with the answer do not begin like "
                "that. Give another template (model.chat_template), or set data.targets to all"
            )
        # Nothing is learnt of the line break after the end mark: generation has stopped by then.
        end = len(text.rstrip())
        if end <= len(prompt):
            raise UserError(
                "the chat template leaves out the assistant's answer "
                f"{messages[index]['content'][:60]!r}"
            )
        return text, [(len(prompt), end)]

    def _example(self, text: str, spans: list[Span]) -> Example:
        """Return the text as an example.

        Raises UserError if a turn does not end in a special token: a model trained on it would
        never stop.
        """
        example = encode_text(self.tokenizer, text, spans)
        following = [*example.labels[1:], IGNORE_INDEX]
        ends = [
            a for a, b in zip(example.labels, following) if a != IGNORE_INDEX and b == IGNORE_INDEX
        ]
        if not self._marks.issuperset(ends):
            raise UserError(
                f"the chat template ends the assistant's turn with {text[-40:]!r}, which is not a "
                "special token, so a model trained with it would never stop. Give a template that "
                "writes one, e.g. model.chat_template: chatml"
            )
        return example


class PlainText:
    """Text without a chat template: prompt, answer, EOS.

    BOS comes first if the tokenizer itself begins with it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-text token, so a model would never stop. Set "
                "model.chat_template to chatml"
            )
        self.tokenizer = tokenizer
        first = list(tokenizer("a", add_special_tokens=True)["input_ids"])[:1]
        self._bos = first if first == [tokenizer.bos_token_id] else []
        self._eos = [tokenizer.eos_token_id]

    def prompt(self, prompt: str) -> list[int]:
        """Return the token ids to generate from, with which `example` begins."""
        return [*self._bos, *encode_text(self.tokenizer, prompt, []).input_ids]

    def example(self, prompt: str, answer: str, *, targets: str) -> Example:
        """Return prompt and answer as an example.

        `targets` is "assistant" (the answer and EOS) or "all" (every token but the first).
        """
        span = (len(prompt), len(prompt) + len(answer))
        body = encode_text(self.tokenizer, prompt + answer, [span])
        ids = [*self._bos, *body.input_ids, *self._eos]
        before = [IGNORE_INDEX] * len(self._bos)
        labels = ids if targets == "all" else [*before, *body.labels, *self._eos]
        return Example(ids, [IGNORE_INDEX, *labels[1:]])


def encode_text(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> Example:
    """Return the token ids of `text`, with the characters in `spans` as targets.

    Nothing is added to the text: a template writes its own BOS. A token that lies across the start
    of a span belongs to it. `spans` are in order and do not overlap.
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
