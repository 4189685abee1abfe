"""Batches: the same for any number of processes, each example once an epoch, resumable."""

import random
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.batches.dataset import EvaluationBatches, TrainingBatches
from finetune.data.batches.steps import StepBatch, cut_step, group_by_length
from finetune.data.encode import EncodedDataset
from finetune.data.types import IGNORE_INDEX, Example, MicroBatch
from finetune.errors import UserError
from tests.data.settings import batch_shape


def dataset_of(num_examples: int, *, seed: int = 0, longest: int = 30) -> EncodedDataset:
    generator = random.Random(seed)
    dataset = EncodedDataset()
    for i in range(num_examples):
        ids = [i + 1] * generator.randint(2, longest)  # an example's tokens tell its number
        dataset.append(Example(ids, [IGNORE_INDEX, *ids[1:]]))
    return dataset


def training(dataset: EncodedDataset, *, max_length: int = 32, **options: Any) -> TrainingBatches:
    return TrainingBatches(dataset, batch_shape(**options), max_length=max_length)


def numbers(batch: MicroBatch) -> list[list[int]]:
    """The examples of each sequence, from its tokens."""
    return [
        list(dict.fromkeys(token - 1 for token in sequence if token))
        for sequence in batch["input_ids"].tolist()
    ]


def sequences_of(step: StepBatch) -> list[list[int]]:
    return [sequence for batch in step.micro_batches for sequence in numbers(batch) if sequence]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 8])
def test_the_union_over_processes_is_the_same_step(num_processes: int, packing: bool) -> None:
    dataset = dataset_of(101)
    alone = list(training(dataset, packing=packing).epoch(0))
    shared = [
        list(training(dataset, packing=packing, rank=r, num_processes=num_processes).epoch(0))
        for r in range(num_processes)
    ]
    assert len(alone) > 5
    for expected, parts in zip(alone, zip(*shared, strict=True), strict=True):
        assert len({len(part.micro_batches) for part in parts}) == 1, (
            "as many forwards on every process"
        )
        rounds = zip(*(part.micro_batches for part in parts), strict=True)
        union = [ids for batches in rounds for batch in batches for ids in numbers(batch) if ids]
        assert union == sequences_of(expected), (
            "no sequence lost or doubled, and the order is the same"
        )
        targets = sum(len(batch["targets"]) for part in parts for batch in part.micro_batches)
        tokens = sum(
            int((batch["input_ids"] != 0).sum()) for part in parts for batch in part.micro_batches
        )
        assert {part.num_target_tokens for part in parts} == {targets}
        assert {part.num_tokens for part in parts} == {tokens}
        assert all(len(batch["input_ids"]) <= 2 for part in parts for batch in part.micro_batches)
        assert [ids for part in parts for ids in part.example_ids if ids] != []


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 9))
def test_shares_cut_a_step_exactly(
    num_sequences: int, micro_batch_size: int, num_processes: int
) -> None:
    shares = [
        cut_step(
            num_sequences,
            batch_shape(micro_batch_size=micro_batch_size, rank=r, num_processes=num_processes),
        )
        for r in range(num_processes)
    ]
    assert len({len(part) for part in shares}) == 1
    assert [i for batches in zip(*shares, strict=True) for batch in batches for i in batch] == list(
        range(num_sequences)
    )
    assert max(len(batch) for part in shares for batch in part) <= micro_batch_size
    if num_sequences >= num_processes:
        assert all(len(part[0]) for part in shares), (
            "no process is idle if there are sequences enough"
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_each_example_once_an_epoch(
    num_examples: int, batch_size: int, micro_batch_size: int, packing: bool
) -> None:
    batches = training(
        dataset_of(num_examples),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        packing=packing,
    )
    for epoch in range(2):
        steps = list(batches.epoch(epoch))
        assert len(steps) == batches.steps_per_epoch
        assert sorted(
            i for step in steps for sequence in sequences_of(step) for i in sequence
        ) == list(range(num_examples))
        sizes = [len(sequences_of(step)) for step in steps]
        assert all(size == batch_size for size in sizes[:-1])
        assert steps[-1].epoch == epoch + 1


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_differ_and_seeds_differ_and_runs_do_not(packing: bool) -> None:
    dataset = dataset_of(80)

    def order(seed: int, epoch: int) -> list[Any]:
        return [
            sequences_of(step)
            for step in training(dataset, packing=packing, seed=seed).epoch(epoch)
        ]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


@pytest.mark.parametrize("packing", [True, False])
def test_resuming_at_any_step_gives_the_steps_of_an_uninterrupted_run(packing: bool) -> None:
    dataset = dataset_of(40)
    full = training(dataset, packing=packing)
    n = 3 * full.steps_per_epoch
    assert full.steps_per_epoch > 2
    expected = list(islice(full, n))
    for stop in range(n):
        first = training(dataset, packing=packing)
        for _ in islice(first, stop):
            pass
        second = training(dataset, packing=packing)
        second.load_state_dict(first.state_dict())
        assert_same(list(islice(second, n - stop)), expected[stop:])


def assert_same(steps: list[StepBatch], expected: list[StepBatch]) -> None:
    assert len(steps) == len(expected)
    for step, other in zip(steps, expected):
        assert step.epoch == other.epoch
        for batch, wanted in zip(step.micro_batches, other.micro_batches, strict=True):
            assert batch.keys() == wanted.keys()
            assert all(torch.equal(batch[key], wanted[key]) for key in batch)  # type: ignore[literal-required]


def test_resuming_with_other_data_is_refused() -> None:
    state = training(dataset_of(40)).state_dict()
    with pytest.raises(
        UserError, match="the training data is not the one that this run began with"
    ):
        training(dataset_of(40, seed=1)).load_state_dict(state)


def test_packed_sequences_are_full_and_as_many_in_every_epoch() -> None:
    batches = training(dataset_of(400, longest=16), batch_size=4)
    for epoch in range(3):
        steps = list(batches.epoch(epoch))
        assert len(steps) == batches.steps_per_epoch
        assert sum(step.num_tokens for step in steps) / (32 * batches.num_sequences) > 0.97


def test_length_grouping_saves_padding_and_leaves_steps_in_random_order() -> None:
    dataset = dataset_of(512, longest=200)
    steps = list(
        training(dataset, packing=False, batch_size=8, micro_batch_size=4, max_length=256).epoch(0)
    )
    room = sum(batch["input_ids"].numel() for step in steps for batch in step.micro_batches)
    assert sum(step.num_tokens for step in steps) / room > 0.95
    sizes = [step.num_tokens for step in steps]
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))
    halves = [sum(sizes[:32]), sum(sizes[32:])]
    assert max(halves) < 1.3 * min(halves)


def test_grouping_keeps_the_short_group_at_the_end() -> None:
    lengths = [3, 1, 2, 9, 8, 7, 5]
    order = group_by_length(range(7), lengths, window=7, group=2, generator=random.Random(0))
    assert sorted(order) == list(range(7))
    assert order[-1] == 3
    assert all(abs(lengths[a] - lengths[b]) <= 2 for a, b in zip(order[0:6:2], order[1:6:2]))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_evaluation_sees_each_example_once(
    batch_size: int, num_processes: int, packing: bool
) -> None:
    dataset = dataset_of(50)
    parts = [
        EvaluationBatches(
            dataset,
            max_length=32,
            packing=packing,
            batch_size=batch_size,
            pad_id=0,
            rank=r,
            num_processes=num_processes,
        )
        for r in range(num_processes)
    ]
    assert len({len(part) for part in parts}) == 1
    seen = [i for part in parts for batch in part for ids in numbers(batch) for i in ids]
    assert sorted(seen) == list(range(50))
    assert all(len(batch["input_ids"]) <= batch_size for part in parts for batch in part)
    targets = sum(len(batch["targets"]) for part in parts for batch in part)
    assert targets == sum(dataset.target_counts)
    widths = [batch["input_ids"].shape[1] for batch in parts[0] if numbers(batch)[0]]
    assert widths == sorted(widths, reverse=True), (
        "the longest first: what does not fit into memory shows at once"
    )
