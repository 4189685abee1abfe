"""Batched generation with a key-value cache, and streaming of one answer as text.

Prompts are sorted by length and padded on the left, so that all prompts of a batch grow at the same
end. The starts that prompts of a batch share (the template, the system prompt, the instruction) are
read once each (`beginnings`). A prompt leaves the batch when its answer is finished. Logits are
computed for the last position only. Up to rounding, an answer depends neither on the batch size nor
on the other prompts: a model that cannot do all this is asked in a slower way (`batching`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from finetune.data.types import Tokenizer
from finetune.errors import UserError
from finetune.inference.batching import batches_of, way_of
from finetune.inference.beginnings import KeptCache
from finetune.inference.decoder import Decoder, GenerationSettings, answer_room
from finetune.models.describe import CausalLM
from finetune.models.language_model import evaluating

_Item = TypeVar("_Item")


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    settings: GenerationSettings,
    batch_size: int,
    first: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, in the order of the prompts, without the stop token.

    `model` is on its device, in any mode: it is evaluated in evaluation mode, then put back.
    `batch_size` prompts run at a time. `first` is the number of the first prompt. With the seed the
    number decides the random draws, so prompts that are answered part by part go on counting.
    `on_progress(done, total)` is called each time some prompts are finished. Raises UserError for a
    prompt that is empty or leaves no room for an answer.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    start = done = 0
    with evaluating(model):
        way = way_of(model)
        for members in batches_of(prompts, way, batch_size):
            own_settings = {i: with_seed(settings, first + i) for i in members}
            decoder = Decoder(model, {i: prompts[i] for i in members}, own_settings, way)
            start += len(members)
            while decoder.active:
                for i, token in decoder.step():
                    answers[i].append(token)
                now = start - len(decoder.active)
                if on_progress is not None and done != now:
                    done = now
                    on_progress(done, len(prompts))
    return answers


def stream(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    settings: GenerationSettings,
    *,
    on_token: Callable[[], None] | None = None,
    kept: KeptCache | None = None,
) -> Iterator[str]:
    """Yield the answer to one prompt in pieces of text that join to the whole answer.

    No character is cut in two. `on_token` is called for each token of the answer. `kept` has what
    the model has read of this conversation already. Raises UserError as `generate` does.
    """
    text = AnswerText(tokenizer)
    with evaluating(model):
        decoder = Decoder(model, {0: prompt}, {0: settings}, way_of(model), kept=kept)
        for token in decoder.tokens():
            if on_token is not None:
                on_token()
            if piece := text.add(token):
                yield piece
    if rest := text.rest():
        yield rest


def chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Yield `items` in lists of `size`; a UserError of the next item comes after those before it.

    So the answers to what came before are not lost.
    """
    chunk: list[_Item] = []
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except UserError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def require_room(
    model: CausalLM, prompt: Sequence[int], max_new_tokens: int, named: str
) -> Sequence[int]:
    """Return `prompt`. Raises UserError, which begins with `named`, if no answer can follow it."""
    try:
        answer_room(model, prompt, max_new_tokens)
    except UserError as error:
        raise UserError(f"{named}{error}") from error
    return prompt


def with_seed(settings: GenerationSettings, number: int) -> GenerationSettings:
    """Return the settings of prompt `number`, whose seed differs from those of the others."""
    return settings if settings.seed is None else replace(settings, seed=settings.seed + number)


class AnswerText:
    """The text of an answer, token by token.

    A piece is what the newest tokens add to the text of those shortly before them. A token alone
    may decode differently: SentencePiece drops the space at the start of a text. The idea is
    `stream` of Hugging Face's text-generation-inference.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens whose text was returned already
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """Return the text that `token` completes; "" until all bytes of a character have come."""
        self._pending.append(token)
        before, after = self._decode(self._context), self._decode(self._context + self._pending)
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return after[len(before) :]

    def rest(self) -> str:
        """Return what is left at the end of the answer."""
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
