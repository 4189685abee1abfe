"""How a micro-batch is taken apart for attention on a CPU: into groups of examples, or of nodes.

The examples of a micro-batch are sorted into groups of similar length and padded. Trees
(`finetune.data.batches.trees`) are taken apart into their nodes. The queries of a node see the keys
on its path, from the root on, and those of siblings are in one group.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QUERIES = 256
"""Queries of an example in one product.

They see the keys up to the last of them, so half of a long example is left out.
"""
SCORES = 2**21
"""The most scores in one product: as many as stay in the caches between product and softmax."""
LENGTHS = (64, 128, 256)
"""What the lengths of examples are padded to; above that, to a multiple of 128.

There are few of them because oneDNN makes and keeps 2 MB of code for each shape of a product.
"""
TREE_QUERIES = 64
"""Queries of a node in one product: few, so that little of what they may not see is computed."""
PATHS = (16, 32, 64, 96, 128)
"""What the lengths of paths to a node are padded to; above that, to a multiple of 64."""
ALIKE = 0.75
"""The share of a group's longest example that another one needs to join it.

Padding then costs less than one more product.
"""


_Blocks = tuple[tuple[slice, slice], ...]


@dataclass(frozen=True)
class AttentionGroup:
    """G examples, or G nodes with one parent, padded to one length L."""

    size: tuple[int, int]  # G, L
    # [G * L] int64: each token's place in the sequences laid end to end; padding has the place of
    # its example's first token.
    tokens: Tensor
    slots: Tensor | None  # [n] int64: those that are not padding; None: all
    # queries, and the keys that they may see, counted from the first of the path
    blocks: _Blocks
    bias: Tensor  # [L or more, P + L or more] float32, added to the scores: 0 or -inf
    # Of nodes: the stretches of places of each, and of the tokens before them.
    spans: tuple[tuple[int, int], ...] = ()
    path: tuple[tuple[int, int], ...] = ()
    path_places: Tensor | None = None  # [P] int64: those of the path; padding comes first
    is_causal: bool = False  # each query sees all keys up to itself, and no others


@dataclass(frozen=True)
class Layout:
    """How a micro-batch is taken apart, the same in all layers that share a mask."""

    groups: list[AttentionGroup]
    of_trees: bool = False  # a key may be seen from several groups


def plan_layout(
    lengths: Sequence[int],
    heads: int,
    *,
    window: Tensor | None = None,
    few_shapes: bool = True,
) -> Layout:
    """Return how examples of `lengths` that follow each other are taken apart.

    `window`: [longest, longest] bool, the keys that each query of an example sees, its own and some
    earlier ones; None: all earlier ones. `few_shapes`: pad groups to a few lengths, as products
    want it, and not just to their longest.
    """
    padded, longest = _padded if few_shapes else int, max(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    # What padding sees does not count, but it must see something.
    bias = torch.full((padded(longest),) * 2, -torch.inf).triu_(1)
    if window is not None:
        bias[:longest, :longest].masked_fill_(~window, -torch.inf)
    groups = []
    for part in _alike(lengths, heads, padded, queries=QUERIES):
        size, tokens, slots = _slots([lengths[i] for i in part], starts[part], padded)
        blocks = _blocks(size[1], QUERIES)
        groups.append(AttentionGroup(size, tokens, slots, blocks, bias, is_causal=window is None))
    return Layout(groups)


def max_together(length: int, heads: int, *, few_shapes: bool = True) -> int:
    """Return how many examples of one length are a group at most."""
    longest = _padded(length) if few_shapes else length
    return max(1, SCORES // (longest * min(longest, QUERIES) * heads))


def plan_tree_layout(
    reach: Sequence[int],
    positions: Sequence[int],
    heads: int,
    *,
    window: int | None = None,
    few_shapes: bool = True,
) -> Layout:
    """Return how trees that follow each other are taken apart.

    `reach` and `positions` of each token are as in `finetune.data.types.MicroBatch`. In a sliding
    `window` a query sees so many positions, its own included. `few_shapes` as in `plan_layout`.
    """
    padded, padded_path = (_padded, _padded_path) if few_shapes else (int, int)
    families: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
    path: list[tuple[int, int, int]] = []  # start, length and reach of the nodes above
    for start, length in _nodes(reach, positions):
        while path and path[-1][2] <= start:
            path.pop()
        families.setdefault(tuple(node[:2] for node in path), []).append((start, length))
        path.append((start, length, reach[start]))
    biases: dict[tuple[int, int], Tensor] = {}
    groups = []
    for above, nodes in families.items():
        depth = sum(length for _, length in above)
        room = padded_path(depth)
        places = None
        if above:
            own = torch.cat([torch.arange(start, start + length) for start, length in above])
            places = torch.cat([own.new_full((room - depth,), above[0][0]), own])
        lengths = [length for _, length in nodes]
        for part in _alike(lengths, heads, padded, queries=TREE_QUERIES, path=room):
            spans = tuple(nodes[i] for i in part)
            starts = torch.tensor([start for start, _ in spans])
            size, tokens, slots = _slots([length for _, length in spans], starts, padded)
            key = (size[1], depth)
            if key not in biases:
                biases[key] = _tree_bias(size[1], depth, room, window)
            blocks = _blocks(size[1], TREE_QUERIES, path=room, window=window)
            causal = not above and window is None
            groups.append(
                AttentionGroup(
                    size, tokens, slots, blocks, biases[key], spans, above, places, causal
                )
            )
    return Layout(groups, of_trees=True)


def _nodes(reach: Sequence[int], positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where each node starts, and its length."""
    start = 0
    for place in range(1, len(reach) + 1):
        if (
            place == len(reach)
            or reach[place] != reach[start]
            or positions[place] != positions[place - 1] + 1
        ):
            yield start, place - start
            start = place


def _tree_bias(length: int, depth: int, room: int, window: int | None) -> Tensor:
    """Return what nodes of `length` behind a path of `depth` see: [length, room + length]."""
    queries = torch.arange(depth, depth + length)[:, None]
    keys = torch.arange(depth - room, depth + length)
    seen = (keys >= 0) & (keys <= queries)
    if window is not None:
        seen &= queries - keys < window
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def _padded(length: int) -> int:
    return next((padded for padded in LENGTHS if padded >= length), -(-length // 128) * 128)


def _padded_path(length: int) -> int:
    known = (padded for padded in (0, *PATHS) if padded >= length)
    return next(known, -(-length // 64) * 64)


def _alike(
    lengths: Sequence[int],
    heads: int,
    padded: Callable[[int], int],
    *,
    queries: int,
    path: int = 0,
) -> Iterator[list[int]]:
    """Yield groups of numbers of examples whose lengths are alike, the longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = padded(lengths[groups[-1][0]]) if groups else 0
        scores = (path + longest) * min(longest, queries) * heads
        if (
            groups
            and padded(lengths[i]) >= ALIKE * longest
            and (len(groups[-1]) + 1) * scores <= SCORES
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return (part for group in groups for part in _cut(group))


def _cut(group: list[int]) -> Iterator[list[int]]:
    """Yield a group in parts of one, two, four ... examples."""
    while group:
        size = 1 << (len(group).bit_length() - 1)
        yield group[:size]
        group = group[size:]


def _slots(
    lengths: Sequence[int], starts: Tensor, padded: Callable[[int], int]
) -> tuple[tuple[int, int], Tensor, Tensor | None]:
    """Return size, tokens and slots of a group."""
    longest = padded(max(lengths))
    steps = torch.arange(longest)
    tokens = starts[:, None] + steps.where(steps < torch.tensor(lengths)[:, None], 0)
    slots = (
        None
        if min(lengths) == longest
        else torch.cat([steps[:n] + i * longest for i, n in enumerate(lengths)])
    )
    return (len(lengths), longest), tokens.flatten(), slots


def _blocks(
    length: int, queries: int, *, path: int = 0, window: int | None = None
) -> tuple[tuple[slice, slice], ...]:
    """Return blocks of queries, and the keys that they may see, behind a `path` of keys."""
    blocks = []
    for start in range(0, length, queries):
        end = min(length, start + queries)
        first = 0 if window is None else max(0, path + start - window + 1) // 16 * 16
        blocks.append((slice(start, end), slice(first, path + end)))
    return tuple(blocks)
