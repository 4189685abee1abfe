"""Rows of examples to the tensors of one micro-batch.

Floor 1. Rows are padded on the right. In packed rows `position_ids` restart at 0 with each example, which is how a model knows
where one ends; the padding is a segment of its own whose positions restart as well, so that no example is seen from it or sees
it, and each of its positions attends to something (no NaN).
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.data.types import IGNORE_INDEX, Batch, Example

MULTIPLE = 8
"""Rows have lengths that are multiples of this: matrix units like them, and oneDNN keeps 2 MB of code for each shape it meets."""


def collate(
    rows: Sequence[Sequence[Example]],
    *,
    pad_id: int,
    packed: bool,
    max_length: int | None = None,
    pad_to_multiple_of: int = MULTIPLE,
) -> Batch:
    """Rows of examples as tensors of shape [rows, length], the length of the longest row rounded up to `pad_to_multiple_of`, but
    not beyond `max_length`, where a model may have no positions left.

    No rows give one row of padding tokens without a target.
    """
    assert packed or all(len(row) == 1 for row in rows), "a padded row holds one example"
    longest = max([1, *(sum(map(len, row)) for row in rows)])
    rounded = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    shape = (
        max(1, len(rows)),
        rounded if max_length is None else max(longest, min(rounded, max_length)),
    )
    ids, labels, positions = array("i"), array("i"), array("i")  # end to end, row by row
    steps = array("i", range(shape[1]))
    for number, row in enumerate(rows or [()], start=1):
        for example in row:
            ids.extend(example.input_ids)
            labels.extend(example.labels)
            positions.extend(steps[: len(example)])
        missing = number * shape[1] - len(ids)
        ids.extend([pad_id] * missing)
        labels.extend([IGNORE_INDEX] * missing)
        positions.extend(steps[:missing])
    batch: Batch = {"input_ids": _tensor(ids, shape), "labels": _tensor(labels, shape)}
    if packed:
        batch["position_ids"] = _tensor(positions, shape)
    return batch


def _tensor(flat: array, shape: tuple[int, int]) -> Tensor:
    return torch.frombuffer(flat, dtype=torch.int32).view(shape).long()
