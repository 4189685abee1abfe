"""The words of the data path, and the label convention, said once.

Floor 0.

**Labels.** `labels[i]` is the token that should stand at position i (so it equals `input_ids[i]`), or `IGNORE_INDEX` where
nothing is to be learnt. They are *not* shifted: the loss compares the prediction made at position i - 1 with `labels[i]`, and
that shift happens in one place, `finetune.compute.loss`. Position 0 is predicted by nothing, hence `labels[0]` is always
`IGNORE_INDEX`; so the number of target tokens of an example is just the number of labels that are not `IGNORE_INDEX`, also after
packing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch

IGNORE_INDEX = -100

Row = Mapping[str, Any]
"""One record of a dataset, as `datasets` yields it."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and labels of one training example, both of shape [length]: lists of ints, or arrays of type "i"."""

    input_ids: Sequence[int]
    labels: Sequence[int]

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.labels) > 0, (len(self.input_ids), len(self.labels))
        assert self.labels[0] == IGNORE_INDEX, (
            "labels[0] has no prediction: see finetune.data.types"
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_target_tokens(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


class Batch(TypedDict, total=False):
    """One micro-batch. `position_ids` is there only for packed rows, where it restarts at 0 with each example.

    Padded rows are padded on the right and need no attention mask: under causal attention no real token sees what comes after it,
    and the labels of the padding are `IGNORE_INDEX`.
    """

    input_ids: torch.Tensor  # [rows, length] int64
    labels: torch.Tensor  # [rows, length] int64, IGNORE_INDEX where there is no target
    position_ids: torch.Tensor  # [rows, length] int64, packed rows only


class Format(Protocol):
    """What turns rows into examples: chat, translation, text."""

    name: str

    def examples(self, row: Row) -> list[Example]:
        """The examples of one row, untruncated (two for a translation pair trained in both directions).

        Raises UserError where the row is not what the format needs; the caller adds which row of which source it was.
        """
        ...

    def prompts(self, row: Row) -> list["Prompt"]:
        """What to ask a model in order to compare its answer with the row's (none for plain text)."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for generation, the answer that the data gives, and both as a person reads them."""

    input_ids: Sequence[int]
    text: str  # what a person sees as the input: the source sentence, the last user turn
    reference: str
