"""The merges of a BPE tokenizer: those that make one token, and those that many tokens need."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError

Merge = tuple[str, str]


@dataclass(frozen=True)
class Bpe:
    """The vocabulary and the merges of a byte-pair encoding, without what cuts a text before it."""

    ids: Mapping[str, int]  # token -> id
    ranks: Mapping[Merge, int]  # the merge of a lower rank comes first
    byte_fallback: bool  # a character that is no token becomes its bytes, <0xNN>

    def derive(self, token: str) -> tuple[list[str], list[Merge]]:
        """Return the characters that `token` begins as, and the merges that BPE makes of them.

        These merges are in their order. They need not end in the token: one that is added, or that
        only stands for a whole word, is made by no merge.
        """
        parts = [symbol for character in token for symbol in self._symbols(character)]
        characters = list(parts)
        made: list[Merge] = []
        while True:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=self._rank, default=None)  # the leftmost of equals
            if best is None or best not in self.ranks:
                return characters, made
            made.append(best)
            place = pairs.index(best)
            parts[place : place + 2] = ["".join(best)]

    def closed(self, tokens: Iterable[str]) -> set[str]:
        """Return `tokens` with the characters and the results of all merges that they need."""
        kept: set[str] = set()
        for token in tokens:
            characters, made = self.derive(token)
            kept |= {token, *characters, *(left + right for left, right in made)}
        return {token for token in kept if token in self.ids}

    def merges_within(self, kept: Collection[str]) -> list[Merge]:
        """Return every merge whose parts and result are all kept, in the old order."""
        return [
            (left, right)
            for left, right in self.ranks
            if left in kept and right in kept and left + right in kept
        ]

    def most_frequent(self, count: int) -> list[str]:
        """Return the `count` tokens that merges make first, which were the most frequent ones."""
        results = dict.fromkeys(left + right for left, right in self.ranks)
        return [token for token in results if token in self.ids][:count]

    def _symbols(self, character: str) -> Sequence[str]:
        if character in self.ids or not self.byte_fallback:
            return [character]
        return [f"<0x{byte:02X}>" for byte in character.encode()]

    def _rank(self, pair: Merge) -> float:
        return self.ranks.get(pair, float("inf"))


def read_bpe(model: Mapping[str, Any]) -> Bpe:
    """Return the BPE in the `model` of a tokenizer.json. Raises UserError if it is another kind.

    WordPiece cuts greedily and Unigram by the best total score: a smaller vocabulary would cut
    texts of kept tokens in other ways.
    """
    kind = str(model.get("type"))
    if kind != "BPE":
        raise UserError(
            f"the tokenizer is {kind}, and only byte-pair encodings (BPE) can be trimmed. Export "
            "without --trim"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(
                f"the tokenizer has {key} = {model[key]!r}, with which it cannot be trimmed. "
                "Export without --trim"
            )
    merges = (
        tuple(merge) if not isinstance(merge, str) else tuple(merge.split(" "))
        for merge in model["merges"]
    )
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    return Bpe(dict(model["vocab"]), ranks, bool(model.get("byte_fallback")))
