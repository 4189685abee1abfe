"""What prompts have in common at their start, read once: within a batch, and from turn to turn."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from finetune.models.cache import RoomyLayer


class Group(NamedTuple):
    """Prompts that begin with the same tokens."""

    shared: int  # tokens at their start that are read once
    members: Sequence[int]  # numbers of the prompts


class KeptCache:
    """The keys and values of a conversation so far, for prompts that begin with the same tokens.

    Sliding windows and states cannot be cut back, so models with them read everything again.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []  # whose keys and values are in the cache
        self.cache: Any = None

    def drop_across(self, length: int | None, prompt: Sequence[int]) -> None:
        """Forget all if `prompt` is longer than `length` tokens and the conversation is not.

        Also the other way around: keys of one rotary scaling are of no use in another.
        """
        if length is not None and (len(self.tokens) > length) != (len(prompt) > length):
            self.tokens, self.cache = [], None

    def take(self, prompt: Sequence[int]) -> int:
        """Cut the cache back to the beginning of `prompt` and return how many tokens it has.

        These are at most all but one.
        """
        count = min(_common(self.tokens, prompt), len(prompt) - 1)
        layers = getattr(self.cache, "layers", ())  # none of a cache that is None
        if count < 1 or {type(layer) for layer in layers} != {RoomyLayer}:
            self.tokens, self.cache = [], None
            return 0
        if count < len(self.tokens):
            self.cache.crop(count - len(self.tokens))
        self.tokens = self.tokens[:count]
        return count

    def add(self, tokens: Sequence[int], cache: Any) -> None:
        """Note that the model has read `tokens`, which are in `cache` now."""
        self.tokens.extend(tokens)
        self.cache = cache


def common_beginnings(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """Return the prompts in groups whose starts are read once each.

    The groups save the most tokens that are read. A prompt alone shares all but its last token, as
    it is read in the same pass. All prompts are one group if more of them save nothing, or would
    pad the cache too much.
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    common = [_common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    best: list[tuple[int, int]] = [(0, 0)]  # tokens saved in the first prompts, the last group
    for end in range(1, len(order) + 1):
        choices, least = [(best[end - 1][0], end - 1)], None
        for start in range(end - 2, -1, -1):
            least = common[start] if least is None else min(least, common[start])
            choices.append((best[start][0] + (end - start - 1) * least, start))
        best.append(max(choices))
    groups, end = list[Group](), len(order)
    while end:
        start = best[end][1]
        members = order[start:end]
        least = min([len(prompts[i]) - 1 for i in members] + common[start : end - 1])
        groups.append(Group(least, members))
        end = start
    least = min([len(prompt) - 1 for prompt in prompts] + common)
    whole = [Group(least, list(range(len(prompts))))]
    if any(group.shared < 1 for group in groups):
        return whole
    cheaper = _tokens_read(prompts, groups) < _tokens_read(prompts, whole)
    small = sum(_longest(prompts, groups)) <= 1.25 * sum(_longest(prompts, whole))
    return groups if cheaper and small else whole


def _longest(prompts: Sequence[Sequence[int]], groups: list[Group]) -> tuple[int, int]:
    """Return the tokens of the longest start, and those of the longest rest."""
    rest = max(len(prompts[i]) - group.shared for group in groups for i in group.members)
    return max(group.shared for group in groups), rest


def _tokens_read(prompts: Sequence[Sequence[int]], groups: list[Group]) -> int:
    """Return the tokens that the model reads of the prompts, padding included."""
    start, rest = _longest(prompts, groups)
    return len(groups) * start + len(prompts) * rest


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
