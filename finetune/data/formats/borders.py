"""The border of prompt and answer in tokens: the same in training as in use.

In use a model gets the tokens of the prompt alone, and writes on. So in training an example must
begin with exactly these tokens. Tokens do not concatenate: a tokenizer may join the end of a prompt
with the start of an answer, such as two line breaks, or a blank and a word.

Prompt and answer are encoded as one text first. If that text begins with the tokens of the prompt,
it is what the model meets. If not, the tokens of the prompt are followed by those of the rest of
the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.types import IGNORE_INDEX, Example, Tokenizer
from finetune.errors import UserError

Span = tuple[int, int]
"""Characters [start, end) of a text."""


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer in its place, which begins after `prompt`."""

    prompt: str
    text: str  # begins with `prompt`
    end: int  # characters of the text, up to the end of the answer with its end mark
    content_end: int | None = None  # the same without the end mark; None if there is none

    @property
    def learnt(self) -> str:
        """The text up to the end of the answer."""
        return self.text[: self.end]

    @property
    def answer(self) -> str:
        """The answer, without its end mark."""
        return self.text[len(self.prompt) : self.content_end or self.end]


def encode_text(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> Example:
    """Return the token ids of `text`, with the characters in `spans` as targets.

    Nothing is added to the text: a template writes its own BOS. A token that lies across the start
    of a span belongs to it. `spans` are in order and do not overlap.
    """
    return _encode(tokenizer, [text], spans)[0]


def _encode(
    tokenizer: Tokenizer, texts: list[str], spans: Sequence[Span]
) -> tuple[Example, list[list[int]]]:
    """Return the first text as `encode_text` does, and the token ids of the others."""
    assert tokenizer.is_fast, "a tokenizer without character offsets"
    encoding = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids, *others = map(list, encoding["input_ids"])
    labels = [IGNORE_INDEX] * len(ids)
    remaining = iter(spans)
    span = next(remaining, None)
    for i, (start, end) in enumerate(encoding["offset_mapping"][0]):
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
    return Example(ids, labels), others


def encode_turns(tokenizer: Tokenizer, text: str, turns: Sequence[Turn]) -> Example | None:
    """Return `text` as one example in which the answers of all `turns` are learnt.

    `text` begins with the text of each turn. Returns None if the tokens of `text` do not begin with
    those of each prompt.
    """
    spans = [(len(turn.prompt), turn.end) for turn in turns]
    example, prompts = _encode(tokenizer, [text, *(turn.prompt for turn in turns)], spans)
    ids, labels = example.input_ids, list(example.labels)
    for prompt in prompts:
        if list(ids[: len(prompt)]) != prompt:
            return None
        # A blank before the first word has no characters of its own in some tokenizers' offsets.
        if 0 < len(prompt) < len(labels):
            labels[len(prompt)] = ids[len(prompt)]
    return Example(ids, labels)


def encode_turn(tokenizer: Tokenizer, turn: Turn) -> Example:
    """Return the tokens of the prompt and then those of the answer, which is learnt.

    Raises UserError for a tokenizer that cannot continue after the prompt.
    """
    example = encode_turns(tokenizer, turn.learnt, [turn])
    if example is not None:
        return example
    prompt = list(encode_text(tokenizer, turn.prompt, []).input_ids)
    rest = _continuation(tokenizer, prompt, turn)
    return Example([*prompt, *rest], [*([IGNORE_INDEX] * len(prompt)), *rest])


def _continuation(tokenizer: Tokenizer, prompt: Sequence[int], turn: Turn) -> list[int]:
    """Return the tokens of the answer as a model writes them after the tokens of the prompt.

    Some tokenizers write a blank before a text, but not after something else. So the answer is also
    tried after a special token and after a line break.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    whole, answer = tokenizer.decode(encode(turn.learnt)), turn.learnt[len(turn.prompt) :]
    for before in ("", *list(tokenizer.get_added_vocab())[:1], "\n"):
        start, ids = encode(before), encode(before + answer)
        rest = ids[len(start) :]
        if ids[: len(start)] == start and tokenizer.decode([*prompt, *rest]) == whole:
            return rest
    raise UserError(
        f"the tokenizer joins the end of the prompt, {turn.prompt[-20:]!r}, with the answer, "
        f"{answer[:20]!r}, so the model would learn another prompt than it gets in use. Begin the "
        "answer with a word"
    )
