"""Rows of examples to the tensors of one micro-batch.

Floor 1. Rows are padded on the right. In packed rows `position_ids` restart at 0 with each example, which is how a model knows
where one ends; the padding is a segment of its own whose positions restart as well, so that no example is seen from it or sees
it, and each of its positions attends to something (no NaN).
"""

from collections.abc import Sequence

import torch

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
    shape = (max(1, len(rows)), rounded if max_length is None else max(longest, min(rounded, max_length)))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    position_ids = torch.arange(shape[1]).repeat(shape[0], 1)
    for r, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example)
            input_ids[r, start:end] = torch.as_tensor(example.input_ids)
            labels[r, start:end] = torch.as_tensor(example.labels)
            position_ids[r, start:] -= position_ids[r, start].item()
            start = end
        if start < shape[1]:
            position_ids[r, start:] -= position_ids[r, start].item()
    batch: Batch = {"input_ids": input_ids, "labels": labels}
    if packed:
        batch["position_ids"] = position_ids
    return batch
