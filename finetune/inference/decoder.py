"""A batch of prompts that grow token by token: reading them, choosing tokens, leaving the batch.

How the prompts are put together is a `Way`, since not every model can read padding. `batching`
finds the one that suits a model.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from finetune.compute.rotary import switching_length
from finetune.errors import UserError
from finetune.inference.beginnings import Group, KeptCache, common_beginnings
from finetune.inference.sampling import next_tokens, penalise_repetition
from finetune.models.cache import can_join, cut_start, join_caches, join_rows, make_room
from finetune.models.describe import CACHE_NAMES, CausalLM, cache_of, context_length, taken


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

    @classmethod
    def greedy(cls, max_new_tokens: int, stop_ids: Sequence[int] = ()) -> Self:
        """Return the settings that take the likeliest token each time."""
        return cls(
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            stop_ids=stop_ids,
        )


class Way(NamedTuple):
    """How prompts are read together."""

    shares: bool = False  # what prompts share at their start is read once; padding comes after it
    pads: bool = False  # shorter prompts are padded on the left
    batches: bool = False  # several prompts go together; of one length, unless `pads`
    caches: bool = False  # what was read is kept; else the whole text is read again for each token


class Decoder:
    """A batch of prompts, one token further at each step. `active` has the unfinished prompts.

    A finished prompt keeps its row until an eighth of the rows can go, since each time the whole
    cache is copied.

    `model` is on its device and in evaluation mode. Each prompt has settings of its own. A `way`
    without `batches` takes one prompt. `kept` has what was read of a conversation before its
    prompt, which is then the only one; only a `way` that shares uses it. Raises UserError for a
    prompt that is empty or leaves no room for an answer.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Mapping[int, Sequence[int]],
        settings: Mapping[int, GenerationSettings],
        way: Way,
        *,
        kept: KeptCache | None = None,
    ) -> None:
        assert (way.batches and kept is None) or len(prompts) == 1
        self.model, self.device, self.settings, self.way = model, model.device, settings, way
        self.active = list(prompts)
        self.rows = list(prompts)  # whose row is which; finished ones may still have theirs
        self.room = {
            i: answer_room(model, prompt, settings[i].max_new_tokens)
            for i, prompt in prompts.items()
        }
        self.last_position = (context_length(model) or 2**62) - 1
        self.switching_length = switching_length(model.config.get_text_config())
        # Not from torch's own random state: a training run must not be changed by its evaluations.
        self.generators = {i: _generator(settings[i].seed) for i in prompts}
        self.seen: Tensor | None = None
        self.cache: Any = None
        self.kept = kept if way.shares else None
        texts = list(prompts.values())
        groups = [Group(0, range(len(texts)))]
        if self.kept is not None:
            self.kept.drop_across(self.switching_length, texts[0])
            groups = [Group(self.kept.take(texts[0]), [0])]
            self.cache = self.kept.cache
        elif way.shares and len(texts) > 1:
            groups = common_beginnings(texts)
        self._read(texts, groups)

    @torch.no_grad()
    def _read(self, prompts: list[Sequence[int]], groups: list[Group]) -> None:
        """Read what each group shares at its start, and make the rest the first input.

        Starts and rests are padded on the left.
        """
        starts, mask = self._padded([prompts[group.members[0]][: group.shared] for group in groups])
        group_of = {i: number for number, group in enumerate(groups) for i in group.members}
        places = torch.tensor([group_of[i] for i in range(len(prompts))], device=self.device)
        if starts.shape[1] and self.cache is None:
            options = {} if mask.all() else {"attention_mask": mask, "position_ids": _count(mask)}
            self.cache = cache_of(self._run(input_ids=starts, **options))
            make_room(self.cache)
            self._select(places)
        rests = [prompt[groups[group_of[i]].shared :] for i, prompt in enumerate(prompts)]
        self.input_ids, rest_mask = self._padded(rests)  # [prompts, rest]
        self.ids = torch.cat([starts[places], self.input_ids], dim=1)  # [prompts, start + rest]
        assert self.way.pads or rest_mask.all()
        self.mask = torch.cat([mask[places], rest_mask], dim=1)  # [prompts, start + rest]
        self.position_ids = _count(self.mask)[:, starts.shape[1] :]
        if any(self.settings[i].repetition_penalty != 1.0 for i in self.active):
            num_tokens = self.model.config.get_text_config().vocab_size
            self.seen = torch.zeros(len(prompts), num_tokens, dtype=torch.bool, device=self.device)
            for seen, prompt in zip(self.seen, prompts):
                seen[torch.tensor(prompt, device=self.device)] = True

    def _padded(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return texts padded on the left, and a mask of their tokens, both [texts, longest]."""
        longest = max(map(len, texts))
        ids = [[0] * (longest - len(text)) + list(text) for text in texts]
        mask = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
        both = torch.tensor([ids, mask], dtype=torch.int64, device=self.device)
        return both[0], both[1]

    def tokens(self) -> Iterator[int]:
        """Yield the tokens of the answers as they come."""
        while self.active:
            yield from (token for _, token in self.step())

    @torch.no_grad()
    def step(self) -> list[tuple[int, int]]:
        """Return (prompt, next token) for each active prompt whose answer does not stop here.

        Must not be called once all answers are finished.
        """
        options: dict[str, Any] = {}
        if self.cache is not None and self._switches():
            self._begin_again()
        if self.way.pads:
            options = {"attention_mask": self.mask, "position_ids": self.position_ids}
        if self.kept is not None:
            self.kept.cache = None  # a forward that is broken off leaves half of it
        options |= dict.fromkeys(CACHE_NAMES, self.cache)
        output = self._run(input_ids=self.input_ids, **options)
        if self.way.caches:
            if self.cache is None:
                make_room(cache_of(output))
            self.cache = cache_of(output)
        if self.kept is not None:
            self.kept.add(self.input_ids[0].tolist(), self.cache)
        chosen = self._choose(output.logits[:, -1])
        active = set(self.active)
        tokens = [
            (i, token)
            for i, token in zip(self.rows, chosen.tolist())
            if i in active and token not in self.settings[i].stop_ids
        ]
        for i, _ in tokens:
            self.room[i] -= 1
        self.active = [i for i, _ in tokens if self.room[i] > 0]
        self._advance(chosen)
        return tokens

    @torch.no_grad()
    def join(self, other: "Decoder") -> bool:
        """Take over the prompts of `other`, which have other numbers; return whether it could.

        Both are at their second token or later. Only a cache that keeps all tokens can be joined.
        """
        joins = self.way.pads and can_join(self.cache) and can_join(other.cache)
        if not joins or self.kept is not None or other.kept is not None:
            return False
        join_caches(self.cache, other.cache)
        self.mask = join_rows(self.mask, other.mask, dim=-1)
        self.ids = join_rows(self.ids, other.ids, dim=-1)
        self.input_ids = torch.cat([self.input_ids, other.input_ids])
        self.position_ids = torch.cat([self.position_ids, other.position_ids])
        if self.seen is not None or other.seen is not None:
            num_tokens = self.model.config.get_text_config().vocab_size
            self.seen = torch.cat(
                [
                    each.mask.new_zeros(len(each.rows), num_tokens, dtype=torch.bool)
                    if each.seen is None
                    else each.seen
                    for each in (self, other)
                ]
            )
        self.active, self.rows = [*self.active, *other.active], [*self.rows, *other.rows]
        self.settings = {**self.settings, **other.settings}
        self.room |= other.room
        self.generators |= other.generators
        return True

    def finish(self, prompt: int) -> None:
        """Let the answer to a prompt end with the next token."""
        self.room[prompt] = 0

    def _run(self, **options: Any) -> Any:
        """Run the model with what its forward takes of `options`.

        A mixture of experts would compute its routers' loss, which needs other masks.
        """
        options |= {"use_cache": self.way.caches, "logits_to_keep": 1}
        if getattr(self.model.config.get_text_config(), "output_router_logits", False):
            options["output_router_logits"] = False
        return self.model(**taken(self.model, options))

    def _choose(self, logits: Tensor) -> Tensor:
        settings = [self.settings[i] for i in self.rows]
        if self.seen is not None:
            penalties = torch.tensor([each.repetition_penalty for each in settings])
            logits = penalise_repetition(logits, self.seen, penalties[:, None].to(self.device))
        generators = [self.generators[i] for i in self.rows]
        ways = [(each.temperature, each.top_p, each.top_k) for each in settings]
        if len(set(ways)) == 1:
            return _draw(logits, ways[0], generators)
        rows = zip(logits.split(1), ways, generators)
        return torch.cat([_draw(row, way, [generator]) for row, way, generator in rows])

    def _advance(self, chosen: Tensor) -> None:
        """Make the chosen tokens the next input, without finished prompts if they are many."""
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        ids = chosen[:, None]
        self.ids = torch.cat([self.ids, ids], dim=1)
        self.input_ids = ids if self.way.caches else self.ids
        # a finished prompt may have no places left
        self.position_ids = (self.position_ids[:, -1:] + 1).clamp(max=self.last_position)
        finished = len(self.rows) - len(self.active)
        if not self.active or finished < max(1, len(self.rows) // 8):
            return
        going_on = set(self.active)
        kept = [place for place, i in enumerate(self.rows) if i in going_on]
        places = torch.tensor(kept, device=self.device)
        self.input_ids, self.mask = self.input_ids[places], self.mask[places]
        self.ids = self.ids[places]
        self.position_ids = self.position_ids[places]
        self.seen = None if self.seen is None else self.seen[places]
        self._select(places)
        self.rows = [self.rows[place] for place in kept]
        # a batch that others join for hours must not grow by those that have left
        self.settings = {i: self.settings[i] for i in self.rows}
        self.room = {i: self.room[i] for i in self.rows}
        self.generators = {i: self.generators[i] for i in self.rows}
        padding = int(self.mask.any(dim=0).int().argmax())  # places at the start, in all rows
        if padding and can_join(self.cache):
            self.mask, self.ids = self.mask[:, padding:], self.ids[:, padding:]
            cut_start(self.cache, padding)

    def _switches(self) -> bool:
        """Return whether a text grows beyond the length at which its scaling becomes another."""
        length, positions = self.switching_length, self.position_ids
        if length is None:
            return False
        return bool(((positions[:, 0] <= length) & (positions[:, -1] >= length)).any())

    def _begin_again(self) -> None:
        """Make the whole texts the next input, and forget what was read of them."""
        self.cache, self.input_ids, self.position_ids = None, self.ids, _count(self.mask)
        if self.kept is not None:
            self.kept.tokens = []

    def _select(self, places: Tensor) -> None:
        """Make `places` of what is kept the new batch, in their order.

        Every kind of state can be put in another order; only attention can be repeated or cut.
        """
        self.cache.reorder_cache(places)


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


def _count(mask: Tensor) -> Tensor:
    """Return the positions of the tokens in `mask`, padding left out."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _draw(
    logits: Tensor, way: tuple[float, float, int], generators: Sequence[torch.Generator]
) -> Tensor:
    temperature, top_p, top_k = way
    return next_tokens(
        logits, temperature=temperature, top_p=top_p, top_k=top_k, generators=generators
    )
