"""Attention in trees against one masked softmax, and how many pairs it computes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.compute import attention
from finetune.compute.layout import plan_tree_layout
from finetune.data.batches.trees import collate_trees, plan_trees
from finetune.data.types import IGNORE_INDEX, Example


def batch_of(paths, *, own, seed=0):
    """A micro-batch of examples whose prompts are paths of (branch, tokens), each path once."""
    generator = random.Random(seed)
    known, examples = {}, []
    for path in paths:
        prompt = []
        for depth in range(len(path)):
            key = path[: depth + 1]
            if key not in known:
                known[key] = [generator.randrange(1, 30_000) for _ in range(path[depth][1])]
            prompt += known[key]
        rest = [generator.randrange(1, 30_000) for _ in range(own)]
        labels = [IGNORE_INDEX] * len(prompt) + rest
        examples.append(Example(prompt + rest, labels))
    (forest,) = plan_trees(examples, capacity=100_000)
    return collate_trees(forest, examples, pad_id=0)


def seen(batch, window):
    """[N, N] bool by its definition: the earlier tokens of a path, near enough by position."""
    reach, positions = batch["reach"][0], batch["position_ids"][0]
    places = torch.arange(len(reach))
    mask = (places <= places[:, None]) & (places[:, None] < reach)
    if window is not None:
        mask &= positions[:, None] - positions < window
    return mask


def layout_of(batch, heads, window=None):
    reach, positions = batch["reach"][0].tolist(), batch["position_ids"][0].tolist()
    return plan_tree_layout(reach, positions, heads, window=window)


def computed_pairs(layout):
    """Pairs of a query and a key that products compute, without the padding of either."""
    count = 0
    for group in layout.groups:
        room = group.bias.shape[1] - group.size[1]
        padding = room - sum(length for _, length in group.path)
        for _, length in group.spans:
            for queries, keys in group.blocks:
                rows = max(0, min(queries.stop, length) - queries.start)
                count += rows * (min(keys.stop, room + length) - max(keys.start, padding))
    return count


TOOLS = [((0, 450),)] * 16
SUPPORT = [((0, 200),)] * 16
DOCUMENTS = [((0, 60), (d, 300), (q, 20)) for d in range(4) for q in range(3) for _ in range(2)]
DEEP = [((0, 100), (a, 90), (b, 80), (c, 70)) for a in (0, 1) for b in (0, 1) for c in (0, 1)] * 2


@pytest.mark.parametrize("window", [None, 400])
@pytest.mark.parametrize(
    ("paths", "own"), [(TOOLS, 60), (SUPPORT, 90), (DOCUMENTS, 40), (DEEP, 60), (TOOLS[:2], 60)]
)
def test_hardly_more_pairs_are_computed_than_the_mask_allows(paths, own, window):
    batch = batch_of(paths, own=own)
    allowed = int(seen(batch, window).sum())
    layout = layout_of(batch, 9, window)
    padding = int((batch["input_ids"] == 0).sum())
    assert padding < 32
    dense = batch["input_ids"].numel() ** 2
    computed = computed_pairs(layout)
    assert allowed <= computed <= 1.2 * allowed
    assert computed < 0.6 * dense


def test_keys_outside_of_a_short_window_are_left_out():
    batch = batch_of(TOOLS, own=60)
    short, long = (computed_pairs(layout_of(batch, 9, window)) for window in (40, None))
    assert short < 0.35 * long


def reference(query, key, value, mask, scale):
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    probabilities = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(*[st.tuples(st.integers(0, 1), st.just(9))] * 4).map(
            lambda path: path[: 1 + sum(branch for branch, _ in path) % 4]
        ),
        min_size=2,
        max_size=9,
    ),
    st.integers(1, 70),
    st.sampled_from([None, 3, 12]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_random_trees_give_the_output_and_gradients_of_one_masked_softmax(
    paths, own, window, dtype, seed
):
    paths = [((0, 9), *path) for path in paths]
    batch = batch_of(paths, own=own, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    count = batch["input_ids"].numel()
    query, key, value = (
        torch.randn(count, heads, 4, dtype=dtype, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    layout = layout_of(batch, 4, window)
    assert any(group.path for group in layout.groups)
    by_head = (tensor[None].transpose(1, 2) for tensor in (query, key, value))
    ours = attention.attend(*by_head, layout, scale=0.5, dropout=0.0)[0]
    theirs = reference(query, key, value, seen(batch, window), 0.5)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, dtype=dtype, generator=generator)
    for mine, right in zip(
        torch.autograd.grad(ours, (query, key, value), weight),
        torch.autograd.grad(theirs, (query, key, value), weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, right)


def test_groups_of_siblings_are_one_product_and_the_shapes_are_few():
    layout = layout_of(batch_of(TOOLS, own=60), 9)
    branches = [group for group in layout.groups if group.path]
    assert {group.size for group in branches} <= {(4, 64), (2, 64)}
    assert {group.bias.shape for group in branches} == {(64, 512 + 64)}
    shapes = {
        (group.size, group.bias.shape)
        for depth in range(100, 500, 7)
        for group in layout_of(batch_of([((0, depth),)] * 8, own=40), 4).groups
    }
    assert len(shapes) < 16
