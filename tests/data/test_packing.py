"""Best-fit packing: nothing lost, nothing too long, and close to the best there is."""

import random
import time
from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.batches.packing import pack

LENGTHS = st.integers(1, 64).flatmap(
    lambda limit: st.tuples(st.lists(st.integers(1, limit), max_size=60), st.just(limit))
)


@given(LENGTHS)
def test_every_example_once_and_no_sequence_too_long(case: tuple[list[int], int]) -> None:
    lengths, limit = case
    sequences = pack(lengths, limit)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in sequence) <= limit for sequence in sequences)


@given(LENGTHS)
def test_no_two_sequences_would_fit_into_one(case: tuple[list[int], int]) -> None:
    lengths, limit = case
    sizes = sorted(sum(lengths[i] for i in sequence) for sequence in pack(lengths, limit))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > limit


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_at_most_eleven_ninths_of_the_best(lengths: list[int]) -> None:
    best = min(
        next_fit(order, 12) for order in permutations(lengths)
    )  # some order makes next-fit optimal
    assert len(pack(lengths, 12)) <= 11 / 9 * best + 1


def next_fit(lengths: tuple[int, ...], limit: int) -> int:
    count, room = 0, 0
    for length in lengths:
        if length > room:
            count, room = count + 1, limit
        room -= length
    return count


def first_fit(lengths: list[int], limit: int) -> int:
    rooms: list[int] = []
    for length in lengths:
        found = next((number for number, room in enumerate(rooms) if room >= length), None)
        if found is None:
            rooms.append(limit - length)
        else:
            rooms[found] -= length
    return len(rooms)


def test_fuller_than_first_fit_on_lengths_as_text_has_them() -> None:
    for seed in range(20):
        generator = random.Random(seed)
        lengths = [min(256, max(4, int(generator.lognormvariate(4, 0.8)))) for _ in range(400)]
        assert len(pack(lengths, 256)) <= first_fit(lengths, 256)


def test_a_case_by_hand() -> None:
    # 6 opens a sequence (4 left), 5 another (5 left); 4 fits best into the first,
    # 3 and 2 fill the second
    assert pack([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]
    assert pack([3, 12, 4], 10) == [[1], [2, 0]], "a longer one has a sequence of its own"


def test_shuffled_lengths_make_sequences_as_full_with_other_companions() -> None:
    generator = random.Random(0)
    lengths = [generator.randint(5, 60) for _ in range(500)]
    order = list(range(500))
    generator.shuffle(order)
    first = pack(lengths, 128)
    second = [[order[i] for i in sequence] for sequence in pack([lengths[i] for i in order], 128)]
    assert sorted(sorted(lengths[i] for i in sequence) for sequence in first) == sorted(
        sorted(lengths[i] for i in sequence) for sequence in second
    )
    assert set(map(frozenset, first)) != set(map(frozenset, second))


def test_two_hundred_thousand_examples_take_about_a_second() -> None:
    generator = random.Random(0)
    lengths = [min(512, max(5, int(generator.lognormvariate(4, 1)))) for _ in range(200_000)]
    started = time.perf_counter()
    sequences = pack(lengths, 512)
    assert time.perf_counter() - started < 5
    assert sum(lengths) / (512 * len(sequences)) > 0.999
