"""Sequences of examples become the tensors of one micro-batch.

Sequences are padded on the right. In packed sequences `position_ids` restart at 0 with each
example, which shows the model where an example begins. The padding is a segment of its own, whose
positions also restart. So no example attends to the padding or is attended to from it, and each
position of the padding attends to something, which avoids NaN.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.data.types import IGNORE_INDEX, Example, MicroBatch, targets_of

LENGTH_MULTIPLE = 8
"""Lengths are multiples of this: matrix units prefer them, and oneDNN keeps 2 MB a shape."""


def collate(
    sequences: Sequence[Sequence[Example]],
    *,
    pad_id: int,
    packed: bool,
    max_length: int | None = None,
    pad_to_multiple_of: int = LENGTH_MULTIPLE,
) -> MicroBatch:
    """Return sequences of examples as tensors of shape [sequences, length], with their targets.

    The length is that of the longest sequence, rounded up to `pad_to_multiple_of`. It is not
    rounded beyond `max_length`, where a model may have no positions left. Without sequences the
    result is one sequence of padding without a target.
    """
    assert packed or all(len(sequence) == 1 for sequence in sequences), (
        "a padded sequence holds one example"
    )
    longest = max([1, *(sum(map(len, sequence)) for sequence in sequences)])
    rounded = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    length = rounded if max_length is None else max(longest, min(rounded, max_length))
    shape = (max(1, len(sequences)), length)
    ids, labels, positions = array("i"), array("i"), array("i")  # one sequence after another
    counting = array("i", range(length))
    for number, sequence in enumerate(sequences or [()], start=1):
        for example in sequence:
            ids.extend(example.input_ids)
            labels.extend(example.labels)
            positions.extend(counting[: len(example)])
        missing = number * length - len(ids)
        ids.extend([pad_id] * missing)
        labels.extend([IGNORE_INDEX] * missing)
        positions.extend(counting[:missing])
    batch: MicroBatch = {
        "input_ids": flat_tensor(ids, shape),
        "targets": targets_of(flat_tensor(labels, shape)),
    }
    if packed:
        batch["position_ids"] = flat_tensor(positions, shape)
    return batch


def flat_tensor(flat: array, shape: tuple[int, int]) -> Tensor:
    """Return the numbers in `flat`, of type "i", as int64 in `shape`."""
    return torch.frombuffer(flat, dtype=torch.int32).view(shape).long()
