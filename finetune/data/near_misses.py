"""What keeps examples from sharing more of their beginnings: a date before a long text, and so on.

Examples that differ early and then agree again would share the long part if it came first.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

from finetune.data.batches.dataset import TrainingBatches
from finetune.data.batches.steps import BatchShape
from finetune.data.batches.trees import beginning
from finetune.data.encode import EncodedDataset, spread
from finetune.data.types import IGNORE_INDEX, Example, Tokenizer
from finetune.errors import visible

EXAMPLES = 400  # that are looked at, at most
PAIRS = 20  # of them, to find what they have in common
LONG = 32  # tokens in common that are worth moving


@dataclass(frozen=True)
class NearMiss:
    """Where examples differ before a long part that they have in common."""

    token: int  # the first that differs, from 0
    texts: tuple[str, str]  # what two of them have there
    common: int  # tokens that they have in common behind it
    saves: float  # times fewer tokens, if the common part came first

    def sentence(self) -> str:
        one, other = (f"“{visible(text.strip()):.40}”" for text in self.texts)
        return (
            f"examples differ from token {self.token + 1} on ({one}, {other}), before "
            f"{self.common} tokens that they have in common. Behind these it would leave "
            f"{self.saves:.1f} times fewer tokens"
        )


def near_miss(
    train: EncodedDataset, shape: BatchShape, tokenizer: Tokenizer, *, max_length: int
) -> NearMiss | None:
    """Return what most keeps the examples from sharing, if moving it saves a lot.

    `shape` is that of the run's steps.
    """
    examples = spread(train, EXAMPLES)
    keys = [array("i", beginning(example)) for example in examples]
    every = max(1, len(keys) // PAIRS)
    found = [miss for pair in pairwise(keys[::every]) if (miss := _between(*pair)) is not None]
    if 2 * len(found) < len(keys[::every]) - 1 or not found:
        return None
    start, one, other, common = max(found, key=lambda miss: _occurrences(keys, miss[3]))
    moved = EncodedDataset()
    for example, key in zip(examples, keys, strict=True):
        moved.append(_moved(example, key, start, common))
    now, then = (
        TrainingBatches(dataset, shape, max_length=max_length).count_shared(PAIRS)
        for dataset in (examples, moved)
    )
    before, after = (tokens / computed for tokens, computed in (now, then))
    if after < 1.3 * before:
        return None
    texts = tokenizer.decode(list(one)), tokenizer.decode(list(other))
    return NearMiss(start, texts, len(common), after)


def _between(one: array, other: array) -> tuple[int, array, array, array] | None:
    """Return where two beginnings differ, what each has there, and the long part behind it."""
    start = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), None)
    if start is None:
        return None
    matcher = SequenceMatcher(None, one[start:], other[start:], autojunk=False)
    match = matcher.find_longest_match()
    if match.size < LONG:
        return None
    first, second = start + match.a, start + match.b
    return start, one[start:first], other[start:second], one[first : first + match.size]


def _occurrences(keys: Sequence[array], part: array) -> int:
    """Return how many tokens of all beginnings are those of `part`, once in each."""
    return len(part) * sum(_place(key, part, 0) is not None for key in keys)


def _place(key: array, part: array, start: int) -> int | None:
    """Return where `part` is in `key`, from `start` on; None if it is not."""
    whole, wanted = key.tobytes(), part.tobytes()
    place = whole.find(wanted, 4 * start)
    while place % 4 and place >= 0:
        place = whole.find(wanted, place + 1)
    return None if place < 0 else place // 4


def _moved(example: Example, key: array, start: int, common: array) -> Example:
    """Return the example with the part in common at `start`, if it has it."""
    place = _place(key, common, start)
    if place is None:
        return example
    rest = [*key[start:place], *key[place + len(common) :], *example.input_ids[len(key) :]]
    ids = [*key[:start], *common, *rest]
    return Example(ids, [IGNORE_INDEX] * len(key) + list(example.labels[len(key) :]))
