"""Sequences to tensors: padding, targets, and positions that keep packed examples apart."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches.collate import collate
from finetune.data.types import IGNORE_INDEX, Example


def example(*ids: int) -> Example:
    return Example(list(ids), [IGNORE_INDEX, *ids[1:]])


def test_padded_sequences_by_hand() -> None:
    batch = collate(
        [[example(5, 6, 7)], [example(8, 9)]], pad_id=0, packed=False, pad_to_multiple_of=1
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["targets"].tolist() == [[0, 6], [1, 7], [3, 9]]
    assert "position_ids" not in batch
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}  # type: ignore[attr-defined]


def test_packed_sequences_by_hand() -> None:
    batch = collate(
        [[example(5, 6, 7), example(8, 9)], [example(1, 2)]],
        pad_id=0,
        packed=True,
        pad_to_multiple_of=4,
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[0, 6], [1, 7], [3, 9], [8, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]]


def test_padding_ends_where_a_model_may_have_no_position_left() -> None:
    sequences = [[example(*range(1, 10))]]
    assert collate(sequences, pad_id=0, packed=False)["input_ids"].shape == (1, 16)
    assert collate(sequences, pad_id=0, packed=False, max_length=12)["input_ids"].shape == (1, 12)
    assert collate(sequences, pad_id=0, packed=False, max_length=9)["input_ids"].shape == (1, 9)


def test_no_sequences_give_a_batch_without_a_target() -> None:
    for packed in (False, True):
        batch = collate([], pad_id=3, packed=packed)
        assert batch["input_ids"].tolist() == [[3] * 8]
        assert batch["targets"].shape == (0, 2)
        assert ("position_ids" in batch) == packed


SEQUENCES = st.lists(
    st.lists(
        st.lists(st.integers(1, 99), min_size=1, max_size=6).map(lambda ids: example(*ids)),
        min_size=1,
        max_size=4,
    ),
    max_size=4,
)


@given(SEQUENCES, st.sampled_from([1, 8]))
def test_packed_sequences_hold_the_examples_and_no_target_crosses_a_border(
    sequences: list[list[Example]], multiple: int
) -> None:
    batch = collate(sequences, pad_id=0, packed=True, pad_to_multiple_of=multiple)
    assert batch["input_ids"].shape[1] % multiple == 0
    assert batch["input_ids"][batch["input_ids"] > 0].tolist() == [
        token for sequence in sequences for e in sequence for token in e.input_ids
    ]
    first = batch["position_ids"] == 0
    assert int(first.sum()) >= sum(map(len, sequences)), "each example is a segment of its own"
    places, tokens = batch["targets"].unbind(1)
    assert not first.flatten()[places + 1].any(), "the first token of a segment has no prediction"
    assert tokens.tolist() == [
        token for sequence in sequences for e in sequence for token in e.input_ids[1:]
    ]
    assert torch.equal(batch["input_ids"].flatten()[places + 1], tokens)
    steps = batch["position_ids"][:, 1:] - batch["position_ids"][:, :-1]
    assert bool(((steps == 1) | first[:, 1:]).all()), "positions count up within a segment"
