"""Batched generation with a key-value cache, and streaming of one answer as text.

Floor 3. Prompts are sorted by length and padded on the left, so that all rows of a batch grow at the same end. What the prompts of
a batch have in common at their start (the template, the system prompt, the instruction) is read once for all of them; rows leave
the batch when they finish; logits are computed for the last position only. Up to rounding, an answer depends neither on the batch
size nor on the other prompts. transformers' own `generate` does none of these but the last.
"""

import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NotRequired, TypedDict, Unpack

import torch

from finetune.data.types import Tokenizer
from finetune.errors import UserError
from finetune.models.language_model import evaluating
from finetune.sampling import next_tokens, penalise_repetition


class SamplingSettings(TypedDict):
    """How an answer is drawn; the same words everywhere."""

    max_new_tokens: int
    temperature: float  # 0: greedy
    top_p: float  # 1: off
    top_k: int  # 0: off
    repetition_penalty: float  # 1: off
    stop_ids: Sequence[int]  # the answer ends before the first of these tokens
    seed: NotRequired[
        int | None
    ]  # None: different answers each time (where the temperature is not 0)


def context_length(model: Any) -> int | None:
    """Return the number of positions of a causal language model, None where it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Unpack[SamplingSettings],
) -> list[list[int]]:
    """Return the new tokens of each prompt, in the order of the prompts, without the stop token.

    `model` is a transformers causal language model, on its device, in any mode (evaluation mode is set and the old one restored).
    `batch_size` prompts run at a time. `on_progress(done, total)` is called each time some prompts are finished.
    Raises UserError for a prompt that is empty or leaves no room for an answer.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    done = 0
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            members = longest_first[start : start + batch_size]
            decoder = _Decoder(model, {i: prompts[i] for i in members}, **settings)
            while decoder.active:
                for i, token in decoder.step():
                    answers[i].append(token)
                if on_progress is not None and done != (
                    now := start + len(members) - len(decoder.active)
                ):
                    done = now
                    on_progress(done, len(prompts))
    return answers


def stream(
    model: Any, tokenizer: Tokenizer, prompt: Sequence[int], **settings: Unpack[SamplingSettings]
) -> Iterator[str]:
    """Yield the answer to one prompt in pieces of text that join to the whole answer; a character is never cut in two."""
    with evaluating(model):
        decoder = _Decoder(model, {0: prompt}, **settings)
        yield from text_pieces(decoder.tokens(), tokenizer)


def text_pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Turn tokens into pieces of text, holding back a character until all of its bytes are there.

    A piece is what the newest tokens add to the text of those shortly before them, since a token alone may decode differently
    (SentencePiece drops the space at the start of a text). Idea: `stream` of Hugging Face's text-generation-inference.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    context: list[int] = []  # tokens whose text is out already
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        before, after = decode(context), decode(context + pending)
        if len(after) > len(before) and not after.endswith("\ufffd"):
            yield after[len(before) :]
            context, pending = pending, []
    rest = decode(context + pending)[len(decode(context)) :]
    if rest:
        yield rest


class _Decoder:
    """A batch of prompts on its way through the model, one token a step. `active` names the rows that are not finished."""

    def __init__(
        self,
        model: Any,
        prompts: dict[int, Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
        stop_ids: Sequence[int],
        seed: int | None = None,
    ) -> None:
        self.model, self.device = model, model.device
        self.temperature, self.top_p, self.top_k, self.repetition_penalty = (
            temperature,
            top_p,
            top_k,
            repetition_penalty,
        )
        self.stop_ids = frozenset(stop_ids)
        self.active = list(prompts)
        limit = context_length(model)
        self.room = {i: _room(prompt, max_new_tokens, limit) for i, prompt in prompts.items()}
        seed = (
            secrets.randbits(32) if seed is None else seed
        )  # not torch's own stream: a training run must not notice us
        self.generators = {i: torch.Generator().manual_seed(seed + i) for i in prompts}
        self.seen: torch.Tensor | None = None
        self.cache: Any = None
        self._read(list(prompts.values()), shared=_shared_length(prompts.values(), model.config))

    @torch.inference_mode()
    def _read(self, prompts: list[Sequence[int]], *, shared: int) -> None:
        """Read the first `shared` tokens, the same in all prompts, and lay out the rest, padded on the left, as the first input."""
        if shared:
            start = torch.tensor([list(prompts[0][:shared])], device=self.device)
            self.cache = self.model(
                input_ids=start, use_cache=True, logits_to_keep=1
            ).past_key_values
            self.cache.batch_repeat_interleave(len(prompts))
        width = max(len(prompt) for prompt in prompts)
        padding = [width - len(prompt) for prompt in prompts]
        rest = [[0] * pad + list(prompt[shared:]) for pad, prompt in zip(padding, prompts)]
        mask = [[1] * shared + [0] * pad + [1] * (width - shared - pad) for pad in padding]
        self.input_ids = torch.tensor(rest, device=self.device)  # [rows, width - shared]
        self.mask = torch.tensor(mask, device=self.device)  # [rows, width]
        self.position_ids = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, shared:]
        if self.repetition_penalty != 1.0:
            self.seen = torch.zeros(
                len(prompts),
                self.model.config.get_text_config().vocab_size,
                dtype=torch.bool,
                device=self.device,
            )
            for row, prompt in zip(self.seen, prompts):
                row[torch.tensor(prompt, device=self.device)] = True

    def tokens(self) -> Iterator[int]:
        """Yield the tokens of the answers as they come."""
        while self.active:
            yield from (token for _, token in self.step())

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """Return (row, next token) for each row that does not stop here. Not to be called once all rows are finished."""
        output = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        chosen = self._choose(output.logits[:, -1])
        tokens = [
            (i, token)
            for i, token in zip(self.active, chosen.tolist())
            if token not in self.stop_ids
        ]
        for i, _ in tokens:
            self.room[i] -= 1
        going_on = {i for i, _ in tokens if self.room[i] > 0}
        self._advance(chosen, [row for row, i in enumerate(self.active) if i in going_on])
        return tokens

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            logits = penalise_repetition(logits, self.seen, self.repetition_penalty)
        generators = [self.generators[i] for i in self.active]
        return next_tokens(
            logits,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            generators=generators,
        )

    def _advance(self, chosen: torch.Tensor, kept: list[int]) -> None:
        """Make the chosen tokens the next input, without the rows that are finished."""
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.input_ids, self.position_ids = chosen[:, None], self.position_ids[:, -1:] + 1
        if len(kept) == len(self.active) or not kept:
            self.active = self.active if kept else []
            return
        rows = torch.tensor(kept, device=self.device)
        self.input_ids, self.position_ids, self.mask = (
            self.input_ids[rows],
            self.position_ids[rows],
            self.mask[rows],
        )
        self.seen = None if self.seen is None else self.seen[rows]
        self.cache.batch_select_indices(rows)
        self.active = [self.active[row] for row in kept]


def _room(prompt: Sequence[int], max_new_tokens: int, limit: int | None) -> int:
    """Return how many tokens the answer may have."""
    if not prompt:
        raise UserError(
            "the prompt is empty, and a model continues at least one token: give a text"
        )
    if limit is None:
        return max_new_tokens
    if len(prompt) >= limit:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model reads at most {limit}: shorten the text"
        )
    # The newest token needs no position of its own until it is read again, but a limit that holds everywhere is easier to explain.
    return min(max_new_tokens, limit - len(prompt))


def _shared_length(prompts: Collection[Sequence[int]], config: Any) -> int:
    """Return how many tokens at the start are the same in all prompts, at most all but one, or 0 where sharing is no gain.

    The padding then comes after the shared tokens. Full attention does not mind, as the mask and the positions tell it; a sliding
    window counts places, padding included, so a model that has one shares nothing.
    """
    if len(prompts) == 1 or getattr(config.get_text_config(), "sliding_window", None) is not None:
        return 0
    first, last = (
        min(map(list, prompts)),
        max(map(list, prompts)),
    )  # in lexical order: what these two share, all share
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)
