"""Batched generation with a key-value cache, and streaming of one answer as text.

Prompts are sorted by length and padded on the left, so that all prompts of a batch grow at the same
end. The starts that prompts of a batch share (the template, the system prompt, the instruction) are
read once each (`beginnings`). A prompt leaves the batch when its answer is finished. Logits are
computed for the last position only. Up to rounding, an answer depends neither on the batch size nor
on the other prompts. transformers' own `generate` does only the last of these.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from finetune.data.types import Tokenizer
from finetune.errors import UserError
from finetune.inference.beginnings import KeptCache, common_beginnings
from finetune.models.describe import CausalLM, context_length
from finetune.models.language_model import evaluating


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How an answer is drawn."""

    max_new_tokens: int
    temperature: float  # 0: greedy
    top_p: float  # 1: off
    top_k: int  # 0: off
    repetition_penalty: float  # 1: off
    stop_ids: Sequence[int]  # the answer ends before the first of these tokens
    seed: int | None = None  # None: another answer each time, unless the temperature is 0


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    settings: GenerationSettings,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, in the order of the prompts, without the stop token.

    `model` is on its device, in any mode: it is evaluated in evaluation mode, then put back.
    `batch_size` prompts run at a time. `on_progress(done, total)` is called each time some prompts
    are finished. Raises UserError for a prompt that is empty or leaves no room for an answer.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    done = 0
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            members = longest_first[start : start + batch_size]
            own_settings = {i: with_seed(settings, i) for i in members}
            decoder = Decoder(model, {i: prompts[i] for i in members}, own_settings)
            while decoder.active:
                for i, token in decoder.step():
                    answers[i].append(token)
                now = start + len(members) - len(decoder.active)
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
        for token in Decoder(model, {0: prompt}, {0: settings}, kept=kept).tokens():
            if on_token is not None:
                on_token()
            if piece := text.add(token):
                yield piece
    if rest := text.rest():
        yield rest


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


class Decoder:
    """A batch of prompts, one token further at each step. `active` has the unfinished prompts.

    `model` is on its device and in evaluation mode. Each prompt has settings of its own. `kept` has
    what was read of a conversation before its prompt, which is then the only one. Raises UserError
    for a prompt that is empty or leaves no room for an answer.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Mapping[int, Sequence[int]],
        settings: Mapping[int, GenerationSettings],
        *,
        kept: KeptCache | None = None,
    ) -> None:
        self.model, self.device, self.settings = model, model.device, settings
        self.active = list(prompts)
        self.room = {
            i: answer_room(model, prompt, settings[i].max_new_tokens)
            for i, prompt in prompts.items()
        }
        # Not from torch's own random state: a training run must not be changed by its evaluations.
        self.generators = {i: _generator(settings[i].seed) for i in prompts}
        self.seen: Tensor | None = None
        self.cache: Any = None
        self.kept = kept
        texts = list(prompts.values())
        if kept is not None:
            assert len(texts) == 1, "a kept cache is that of one conversation"
            groups = [(kept.take(texts[0]), [0])]
            self.cache = kept.cache
        elif len(texts) == 1 or _counts_places(model.config):
            groups = [(0, list(range(len(texts))))]
        else:
            groups = common_beginnings(texts)
        self._read(texts, groups)

    @torch.inference_mode()
    def _read(self, prompts: list[Sequence[int]], groups: list[tuple[int, list[int]]]) -> None:
        """Read what each group shares at its start, and make the rest the first input.

        Starts and rests are padded on the left.
        """
        shared = dict.fromkeys(range(len(prompts)), 0)
        shared |= {i: count for count, members in groups for i in members}
        longest = max(count for count, _ in groups)
        if longest and self.cache is None:
            starts = [list(prompts[members[0]][:count]) for count, members in groups]
            read = torch.tensor([[0] * (longest - len(start)) + start for start in starts])
            mask = torch.tensor(
                [[0] * (longest - len(start)) + [1] * len(start) for start in starts]
            )
            padded = {} if mask.all() else _positions(mask.to(self.device))
            self.cache = self.model(
                input_ids=read.to(self.device), use_cache=True, logits_to_keep=1, **padded
            ).past_key_values
            owner = {i: number for number, (_, members) in enumerate(groups) for i in members}
            places = torch.tensor([owner[i] for i in range(len(prompts))], device=self.device)
            self.cache.batch_select_indices(places)
        rests = [list(prompt[shared[i] :]) for i, prompt in enumerate(prompts)]
        width = max(map(len, rests))
        ids = [[0] * (width - len(rest)) + rest for rest in rests]
        seen = [
            [0] * (longest - shared[i])
            + [1] * shared[i]
            + [0] * (width - len(rest))
            + [1] * len(rest)
            for i, rest in enumerate(rests)
        ]
        self.input_ids = torch.tensor(ids, device=self.device)  # [prompts, width]
        self.mask = torch.tensor(seen, device=self.device)  # [prompts, longest + width]
        self.position_ids = _positions(self.mask)["position_ids"][:, longest:]
        if any(self.settings[i].repetition_penalty != 1.0 for i in self.active):
            num_tokens = self.model.config.get_text_config().vocab_size
            self.seen = torch.zeros(len(prompts), num_tokens, dtype=torch.bool, device=self.device)
            for seen, prompt in zip(self.seen, prompts):
                seen[torch.tensor(prompt, device=self.device)] = True

    def tokens(self) -> Iterator[int]:
        """Yield the tokens of the answers as they come."""
        while self.active:
            yield from (token for _, token in self.step())

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """Return (prompt, next token) for each active prompt whose answer does not stop here.

        Must not be called once all answers are finished.
        """
        output = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        if self.kept is not None:
            self.kept.add(self.input_ids[0].tolist(), self.cache)
        chosen = self._choose(output.logits[:, -1])
        tokens = [
            (i, token)
            for i, token in zip(self.active, chosen.tolist())
            if token not in self.settings[i].stop_ids
        ]
        for i, _ in tokens:
            self.room[i] -= 1
        going_on = {i for i, _ in tokens if self.room[i] > 0}
        self._advance(chosen, [place for place, i in enumerate(self.active) if i in going_on])
        return tokens

    def finish(self, prompt: int) -> None:
        """Let the answer to a prompt end with the next token."""
        self.room[prompt] = 0

    def _choose(self, logits: Tensor) -> Tensor:
        settings = [self.settings[i] for i in self.active]
        if self.seen is not None:
            penalties = torch.tensor([each.repetition_penalty for each in settings])
            logits = penalise_repetition(logits, self.seen, penalties[:, None].to(self.device))
        generators = [self.generators[i] for i in self.active]
        ways = [(each.temperature, each.top_p, each.top_k) for each in settings]
        if len(set(ways)) == 1:
            return _draw(logits, ways[0], generators)
        rows = zip(logits.split(1), ways, generators)
        return torch.cat([_draw(row, way, [generator]) for row, way, generator in rows])

    def _advance(self, chosen: Tensor, kept: list[int]) -> None:
        """Make the chosen tokens the next input, without the prompts that are finished."""
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.input_ids, self.position_ids = chosen[:, None], self.position_ids[:, -1:] + 1
        if len(kept) == len(self.active) or not kept:
            self.active = self.active if kept else []
            return
        places = torch.tensor(kept, device=self.device)
        self.input_ids, self.mask = self.input_ids[places], self.mask[places]
        self.position_ids = self.position_ids[places]
        self.seen = None if self.seen is None else self.seen[places]
        self.cache.batch_select_indices(places)
        self.active = [self.active[place] for place in kept]


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(secrets.randbits(32) if seed is None else seed)


def answer_room(model: CausalLM, prompt: Sequence[int], max_new_tokens: int) -> int:
    """Return how many tokens the answer to `prompt` may have.

    Raises UserError if the prompt is empty, or too long for the model.
    """
    if not prompt:
        raise UserError(
            "the prompt is empty, and a model continues at least one token. Give a text"
        )
    limit = context_length(model)
    if limit is None:
        return max_new_tokens
    if len(prompt) >= limit:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model reads at most {limit}. Shorten the "
            "text"
        )
    # The newest token needs no position until it is read again. But a limit that always holds is
    # easier to explain.
    return min(max_new_tokens, limit - len(prompt))


def _counts_places(config: Any) -> bool:
    """Return whether a sliding window counts places, padding included.

    Full attention is told by the mask and the positions what is padding. With a window nothing is
    shared, since padding comes after what is shared.
    """
    return getattr(config.get_text_config(), "sliding_window", None) is not None


def _positions(mask: Tensor) -> dict[str, Tensor]:
    """Return the mask and the positions of sequences that are padded anywhere."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Return `logits` with the tokens that already occurred made less likely.

    Positive logits are divided by `penalty`, negative ones multiplied. `logits` and the boolean
    `seen` are [prompts, V], `penalty` is one number or [prompts, 1].
    Section 4.1 of CTRL, https://arxiv.org/abs/1909.05858
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def _draw(
    logits: Tensor, way: tuple[float, float, int], generators: Sequence[torch.Generator]
) -> Tensor:
    temperature, top_p, top_k = way
    return next_tokens(
        logits, temperature=temperature, top_p=top_p, top_k=top_k, generators=generators
    )


def next_tokens(
    logits: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Return one token for each prompt, [prompts] int64, from `logits` [prompts, V].

    Temperature 0 is greedy. `top_k` keeps the k likeliest tokens (0: all of them). `top_p` then
    keeps the fewest of those whose probabilities reach `top_p` (1: all of them;
    https://arxiv.org/abs/1904.09751). `generators` has one CPU generator for each prompt, so an
    answer does not depend on the prompts next to it.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    num_kept = min(top_k, logits.shape[-1]) if top_k else logits.shape[-1]
    sorted_logits, tokens = logits.float().topk(num_kept, dim=-1)
    probabilities = torch.softmax(sorted_logits / temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # A token stays if those before it have not reached top_p. The likeliest one always stays.
    probabilities = probabilities.masked_fill(cumulative - probabilities >= top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(
        logits.device
    )
    # Inverse transform sampling: the first place whose cumulative probability exceeds `uniform`.
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    # The bound guards against rounding at the very end.
    last_kept = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(place, last_kept)).squeeze(1)
