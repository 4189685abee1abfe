"""`training.batch_size: auto`: small data makes small steps, so that a run has enough of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches.packing import pack
from finetune.data.batches.size import (
    ENOUGH_STEPS,
    LARGEST,
    StepSize,
    largest_size,
    step_size,
    steps_of,
)
from finetune.data.batches.steps import cut_step

from .settings import batch_shape

# sequences, epochs -> sequences of a step, steps of the run
TABLE = [
    (1, 3, None, 3),
    (33, 3, None, 99),
    (34, 3, 1, 102),
    (66, 3, 1, 198),
    (67, 3, 2, 102),
    (133, 3, 4, 102),
    (266, 3, 8, 102),
    (528, 3, 8, 198),
    (529, 3, 16, 102),
    (1_000_000, 3, 16, 187_500),
    (34, 1, None, 34),
    (100, 1, 1, 100),
    (199, 1, 2, 100),
    (50, 2, 1, 100),
    (50, 1.5, None, 75),
    (1600, 1, 16, 100),
    (10, 10, 1, 100),
    (1, 100, 16, 100),
    (20_000, 0.05, 8, 125),
]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize(("sequences", "epochs", "size", "steps"), TABLE)
def test_the_size_of_a_step_of_any_number_of_processes(
    sequences: int, epochs: float, size: int | None, steps: int, num_processes: int
) -> None:
    """The processes share a step, so that the run is the same for all numbers of them."""
    assert largest_size(sequences, epochs) == size
    assert steps_of(math.ceil(sequences / (size or 1)), epochs) == steps
    shapes = [
        batch_shape(batch_size=size or 1, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    shares = [part for shape in shapes for part in cut_step(size or 1, shape)]
    assert sorted(i for part in shares for i in part) == list(range(size or 1))


# lengths, max_length -> the size
SMALL: list[tuple[list[int], int, StepSize]] = [
    ([500] * 40, 512, StepSize(1)),
    ([500] * 20, 512, StepSize(1)),  # no shorter sequence holds fewer examples
    ([100] * 200, 512, StepSize(1)),  # 40 sequences
    ([40] * 100, 512, StepSize(1, 128)),  # 34 sequences of 3 examples, instead of 9 of 12
    ([96] * 6, 512, StepSize(1, 128)),  # one example each, and still only 18 steps
    ([400] + [20] * 99, 512, StepSize(1, 64)),  # the long one has a sequence of its own
    ([20] * 5000, 512, StepSize(4)),
    ([20] * 50_000, 512, StepSize(16)),
    ([7] * 40, 13, StepSize(1)),
]


@pytest.mark.parametrize(("lengths", "max_length", "expected"), SMALL)
def test_sequences_of_small_data_are_shorter(
    lengths: list[int], max_length: int, expected: StepSize
) -> None:
    assert step_size(lengths, epochs=3, max_length=max_length, packing=True) == expected


def test_without_packing_an_example_is_a_sequence() -> None:
    assert step_size([9] * 100, epochs=3, max_length=64, packing=False) == StepSize(2)
    assert step_size([9] * 10, epochs=3, max_length=64, packing=False) == StepSize(1)


@given(
    lengths=st.lists(st.integers(1, 96), min_size=1, max_size=300),
    epochs=st.floats(0.1, 20),
    packing=st.booleans(),
)
def test_the_rule_for_any_data(lengths: list[int], epochs: float, packing: bool) -> None:
    chosen = step_size(lengths, epochs=epochs, max_length=96, packing=packing)

    def steps(size: int, length: int) -> int:
        count = len(pack(lengths, length)) if packing else len(lengths)
        return steps_of(math.ceil(count / size), epochs)

    size, length = chosen.batch_size, chosen.packed_length or 96
    if steps_of(len(lengths), epochs) >= ENOUGH_STEPS:
        assert steps(size, length) >= ENOUGH_STEPS
    else:
        assert steps(size, length) == steps_of(len(lengths), epochs), "as many as there can be"
    if size < LARGEST:
        assert steps(2 * size, length) < ENOUGH_STEPS
    if chosen.packed_length is not None:
        assert packing
        assert steps(1, 2 * length) < ENOUGH_STEPS, "no shorter than needed"
