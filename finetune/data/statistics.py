"""Figures about the data, for `finetune inspect` and `finetune plan`.

How examples read, how long they are, what repeats, and which tokens they use. Nothing is printed
here.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from typing import Any

import numpy as np

from finetune.data.encode import EncodedDataset
from finetune.data.types import IGNORE_INDEX, Example, Tokenizer

_WORD_EXAMPLES = 1000  # examples read for tokens per word


@dataclass(frozen=True)
class DataReport:
    """Figures of the training data and of the held-out data (None if there is none)."""

    train: dict[str, int]  # DataStatistics
    held_out: dict[str, int] | None
    length_p50: int  # tokens
    length_p95: int
    length_max: int
    length_histogram: list[tuple[int, int, int]]  # shortest and longest of a bin, examples in it
    target_share: float  # target tokens / tokens
    tokens_per_word: float  # words are separated by blanks
    duplicates: int  # training examples that also occur earlier in the training data
    leaked: int | None  # held-out examples that also occur in the training data, token for token
    vocabulary_rows: int  # rows of the embedding
    vocabulary_rows_used: int  # rows whose token occurs in the training data
    held_out_coverage: float | None  # share of held-out tokens that occur in the training data

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def coverage(train: EncodedDataset, held_out: EncodedDataset | None) -> float | None:
    """Return the share of held-out tokens that also occur in the training data.

    Without held-out data it is None.
    """
    if held_out is None:
        return None
    used, ids = np.array(sorted(train.used_ids)), held_out.token_ids
    return int(np.isin(ids, used).sum()) / len(ids)


def also_in(train: EncodedDataset, held_out: EncodedDataset) -> int:
    """Return how many held-out examples are also in the training data, token for token."""
    keys = {held_out.key(i) for i in range(len(held_out))}
    known = {key for i in range(len(train)) if (key := train.key(i)) in keys}
    return sum(held_out.key(i) in known for i in range(len(held_out)))


def without(dataset: EncodedDataset, others: EncodedDataset) -> EncodedDataset:
    """Return the dataset without the examples that are also in `others`, which it counts."""
    keys = {others.key(i) for i in range(len(others))}
    kept, counts = EncodedDataset(), dataset.statistics
    for i in range(len(dataset)):
        if dataset.key(i) not in keys:
            kept.append(dataset[i])
    kept.statistics = replace(
        counts,
        examples=len(kept),
        tokens=len(kept.token_ids),
        target_tokens=sum(kept.target_counts),
        duplicates=len(dataset) - len(kept),
    )
    return kept


def report_on(
    train: EncodedDataset, held_out: EncodedDataset | None, *, tokenizer: Tokenizer, vocab_size: int
) -> DataReport:
    """Return the figures of the encoded data. `vocab_size` is the rows of the embedding."""
    lengths = sorted(train.lengths)
    known = Counter(train.key(i) for i in range(len(train)))
    leaked = None if held_out is None else also_in(train, held_out)
    return DataReport(
        train=train.statistics.as_dict(),
        held_out=None if held_out is None else held_out.statistics.as_dict(),
        length_p50=lengths[len(lengths) // 2],
        length_p95=lengths[len(lengths) * 95 // 100],
        length_max=lengths[-1],
        length_histogram=histogram(lengths),
        target_share=sum(train.target_counts) / len(train.token_ids),
        tokens_per_word=tokens_per_word(train, tokenizer),
        duplicates=len(train) - len(known),
        leaked=leaked,
        vocabulary_rows=vocab_size,
        vocabulary_rows_used=len(train.used_ids),
        held_out_coverage=coverage(train, held_out),
    )


def pieces(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Return the example as text, in stretches that are targets (True) or not (False)."""
    tokens = zip(example.input_ids, example.labels)
    stretches = groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX)
    return [
        (tokenizer.decode([token for token, _ in stretch]), is_target)
        for is_target, stretch in stretches
    ]


def histogram(lengths: Sequence[int], *, bins: int = 10) -> list[tuple[int, int, int]]:
    """Return (shortest length, longest length, examples) of each bin, from the shortest on.

    There are at most `bins` bins, all of the same width.
    """
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bins)
    counts = Counter((length - low) // width for length in lengths)
    return [
        (low + b * width, low + (b + 1) * width - 1, counts[b])
        for b in range((high - low) // width + 1)
    ]


def characters_per_token(texts: Iterable[str], tokenizer: Tokenizer) -> float:
    """Return how many characters a token has on average. Below 1, characters fall into bytes."""
    kept = list(texts)
    encoded = tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"] if kept else []
    return sum(map(len, kept)) / max(1, sum(map(len, encoded)))


def tokens_per_word(dataset: EncodedDataset, tokenizer: Tokenizer) -> float:
    """Return tokens per word over the first examples, special tokens left out."""
    special = set(tokenizer.get_added_vocab().values())
    texts = [
        [token for token in example.input_ids if token not in special]
        for example in islice(dataset, _WORD_EXAMPLES)
    ]
    return sum(map(len, texts)) / max(1, sum(len(tokenizer.decode(text).split()) for text in texts))
