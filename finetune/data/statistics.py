"""What is in the data, for `finetune inspect`: how examples read, how long they are, what repeats, which words they use.

Floor 1. Figures only; the command line prints them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import Any

from finetune.data.encode import EncodedDataset
from finetune.data.formats.rendering import Tokenizer
from finetune.data.types import IGNORE_INDEX, Example

_WORD_EXAMPLES = 1000  # examples read for tokens per word


@dataclass(frozen=True)
class DataReport:
    """Figures of the training rows, and of the held-out rows beside them (None where there are none)."""

    train: dict[str, int]  # DataStatistics
    held_out: dict[str, int] | None
    length_p50: int  # tokens
    length_p95: int
    length_max: int
    length_histogram: list[
        tuple[int, int, int]
    ]  # lowest and highest length of a bin, examples in it
    target_share: float  # target tokens / tokens
    tokens_per_word: float  # a word is what stands between blanks
    duplicates: int  # training examples that stand earlier in the training data as well
    leaked: int | None  # held-out examples that are in the training data word for word
    vocabulary_rows: int  # rows of the embedding
    vocabulary_rows_used: int  # of them met in the training data
    held_out_coverage: float | None  # share of the held-out tokens whose row the training data uses

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def coverage(train: EncodedDataset, held_out: EncodedDataset | None) -> float | None:
    """The share of the held-out tokens that stand in the training data too; None without held-out data."""
    if held_out is None:
        return None
    used = set(train.token_ids)
    return sum(token in used for token in held_out.token_ids) / len(held_out.token_ids)


def report_on(
    train: EncodedDataset, held_out: EncodedDataset | None, *, tokenizer: Tokenizer, vocab_size: int
) -> DataReport:
    """Go through the encoded data once."""
    lengths = sorted(train.lengths)
    known = Counter(train.key(i) for i in range(len(train)))
    leaked = None
    if held_out is not None:
        leaked = sum(held_out.key(i) in known for i in range(len(held_out)))
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
        vocabulary_rows_used=len(set(train.token_ids)),
        held_out_coverage=coverage(train, held_out),
    )


def pieces(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The example as text, in stretches that are targets (True) or not."""
    tokens = zip(example.input_ids, example.labels)
    stretches = groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX)
    return [
        (tokenizer.decode([token for token, _ in stretch]), is_target)
        for is_target, stretch in stretches
    ]


def histogram(lengths: Sequence[int], *, bins: int = 10) -> list[tuple[int, int, int]]:
    """(Lowest length, highest length, examples) of at most `bins` bins of equal width from the shortest to the longest."""
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bins)
    counts = Counter((length - low) // width for length in lengths)
    return [
        (low + b * width, low + (b + 1) * width - 1, counts[b])
        for b in range((high - low) // width + 1)
    ]


def tokens_per_word(dataset: EncodedDataset, tokenizer: Tokenizer) -> float:
    """Tokens over words of the first examples, special tokens left out."""
    special = set(tokenizer.get_added_vocab().values())
    texts = [
        [token for token in example.input_ids if token not in special]
        for example in islice(dataset, _WORD_EXAMPLES)
    ]
    return sum(map(len, texts)) / max(1, sum(len(tokenizer.decode(text).split()) for text in texts))
