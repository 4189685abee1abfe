"""How many sequences an optimizer step has if the user does not say (`training.batch_size: auto`).

Small data needs small steps: a model that takes six of them learns nothing. So the rule begins with
the steps of the whole run. It does not depend on processes or micro-batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.batches.packing import pack

ENOUGH_STEPS = 100  # of a whole run; with fewer a model learns little
LARGEST = 16  # sequences of a step
OF_A_LIMIT = 8  # sequences of a step, if something else than epochs ends the run
_SIZES = tuple(2**power for power in range(LARGEST.bit_length() - 1, -1, -1))


@dataclass(frozen=True)
class StepSize:
    """The size of the steps of a run."""

    batch_size: int  # sequences
    packed_length: int | None = None  # tokens of a packed sequence; None: those of max_length


def steps_of(steps_per_epoch: int, epochs: float) -> int:
    """Return the steps of a whole run."""
    return max(1, math.ceil(epochs * steps_per_epoch))


def largest_size(num_sequences: int, epochs: float) -> int | None:
    """Return the largest size of a step that makes ENOUGH_STEPS steps, or None if 1 does not."""
    for size in _SIZES:
        if steps_of(math.ceil(num_sequences / size), epochs) >= ENOUGH_STEPS:
            return size
    return None


def step_size(lengths: Sequence[int], *, epochs: float, max_length: int, packing: bool) -> StepSize:
    """Return the size of steps with which examples of these lengths, in tokens, make enough steps.

    It is a power of two up to LARGEST. If steps of one sequence are too few, packed sequences are
    halved until they are enough, or hold one example each.
    """
    if not packing:
        return StepSize(largest_size(len(lengths), epochs) or 1)
    if largest_size(math.ceil(sum(lengths) / max_length), epochs) == LARGEST:
        return StepSize(LARGEST)  # there are at least so many sequences: large data is packed once
    length, count = max_length, len(pack(lengths, max_length))
    while largest_size(count, epochs) is None and count < len(lengths):
        length //= 2
        count = len(pack(lengths, length))
    size = largest_size(count, epochs) or 1
    return StepSize(size, None if length == max_length else length)
