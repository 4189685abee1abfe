"""What a trimmed tokenizer covers of text that it was not made from."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.types import Tokenizer
from finetune.models.trim.tokenizer import Trimmed

MOST_TEXTS = 500  # that are encoded twice


@dataclass(frozen=True)
class Coverage:
    """How a trimmed tokenizer does on held-out examples."""

    examples: int
    tokens: int
    covered: int  # tokens that are kept
    more: float  # share of tokens that all texts need in addition
    more_outside: float  # the same for texts with a token that is not kept; 0 without any

    @property
    def share(self) -> float:
        """The share of the held-out tokens that are kept."""
        return self.covered / max(1, self.tokens)

    def lines(self) -> list[str]:
        """Return what a reader should know."""
        found = [
            f"Of {self.examples:,} held-out examples, {self.share:.2%} of the tokens are kept. "
            f"They need {self.more:.1%} more tokens than before."
        ]
        if self.covered < self.tokens:
            found.append(
                "Held-out examples with a token that is not kept need "
                f"{self.more_outside:.1%} more tokens."
            )
        return found


def measure_coverage(
    tokenizer: Tokenizer, trimmed: Trimmed, examples: Sequence[Sequence[int]]
) -> Coverage:
    """Return what `trimmed` covers of held-out examples, token ids of `tokenizer`.

    Also asserts that the texts whose tokens are all kept are encoded the same.
    """
    kept = trimmed.new_ids
    tokens = sum(map(len, examples))
    covered = sum(token in kept for example in examples for token in example)
    before, after = [0, 0], [0, 0]  # tokens of the texts within K, and of the others
    for example in examples[:MOST_TEXTS]:
        text = tokenizer.decode([*example])
        old = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        new = trimmed.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        outside = not kept.keys() >= {*old}
        assert outside or [kept[token] for token in old] == new, f"trimming changed {text!r}"
        before[outside] += len(old)
        after[outside] += len(new)
    return Coverage(
        examples=len(examples),
        tokens=tokens,
        covered=covered,
        more=sum(after) / max(1, sum(before)) - 1,
        more_outside=after[1] / before[1] - 1 if before[1] else 0.0,
    )
