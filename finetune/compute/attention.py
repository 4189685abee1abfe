"""Attention on a CPU, as matrix products over the examples of packed sequences.

torch's fused kernel for the CPU visits every pair of positions in a sequence, also those that the
mask forbids. In bf16 it takes six times as long as the same by `torch.bmm` (`LOG.md`). Here the
examples of a micro-batch are sorted into groups of similar length and padded. Each group and block
of queries takes one product. Only queries, keys and values are kept for the backward pass. It
computes the probabilities again, as the fused kernel does (https://arxiv.org/abs/2205.14135).
Queries share key and value heads without copies of these.

Trees (`finetune.data.batches.trees`) are taken apart into their nodes. The queries of a node see
the keys on its path, from the root on, and those of siblings are in one product. Gradients of keys
add up over all nodes below them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

native_dropout_backward = torch.ops.aten.native_dropout_backward

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
class _Group:
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


@dataclass(frozen=True)
class Layout:
    """How a micro-batch is taken apart, the same in all layers that share a mask."""

    groups: list[_Group]
    of_trees: bool = False  # a key may be seen from several groups


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Attend within the examples of `layout`, in the dtype of the query or of autocast, on a CPU.

    query [sequences, heads, length, d], key [sequences, fewer heads, length, d] and value
    [sequences, fewer heads, length, v] give [sequences, length, heads, v]. `scale`: of the scores;
    None: d to the power of -1/2.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        tokens = [_end_to_end(tensor.to(dtype)) for tensor in (query, key, value)]
        output = _Attention.apply(*tokens, layout, scale, dropout)
    return output.view(len(query), -1, *output.shape[1:])


def plan_layout(lengths: Sequence[int], seen: Tensor, heads: int) -> Layout:
    """Return how examples of `lengths` that follow each other are taken apart.

    `seen`: [longest, longest] bool, the keys that each query of an example sees.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)
    # What padding sees does not count, but it must see something.
    bias = torch.full((_padded(len(seen)),) * 2, -torch.inf).triu_(1)
    bias[: len(seen), : len(seen)].masked_fill_(~seen, -torch.inf)
    groups = []
    for part in _alike(lengths, heads, queries=QUERIES):
        size, tokens, slots = _slots([lengths[i] for i in part], starts[part])
        groups.append(_Group(size, tokens, slots, _blocks(size[1], QUERIES), bias))
    return Layout(groups)


def plan_tree_layout(
    reach: Sequence[int], positions: Sequence[int], heads: int, *, window: int | None = None
) -> Layout:
    """Return how trees that follow each other are taken apart.

    `reach` and `positions` of each token are as in `finetune.data.types.MicroBatch`. In a sliding
    `window` a query sees so many positions, its own included.
    """
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
        room = _padded_path(depth)
        places = None
        if above:
            own = torch.cat([torch.arange(start, start + length) for start, length in above])
            places = torch.cat([own.new_full((room - depth,), above[0][0]), own])
        lengths = [length for _, length in nodes]
        for part in _alike(lengths, heads, queries=TREE_QUERIES, path=room):
            spans = tuple(nodes[i] for i in part)
            starts = torch.tensor([start for start, _ in spans])
            size, tokens, slots = _slots([length for _, length in spans], starts)
            key = (size[1], depth)
            if key not in biases:
                biases[key] = _tree_bias(size[1], depth, window)
            blocks = _blocks(size[1], TREE_QUERIES, path=room, window=window)
            groups.append(_Group(size, tokens, slots, blocks, biases[key], spans, above, places))
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


def _tree_bias(length: int, depth: int, window: int | None) -> Tensor:
    """Return what nodes of `length` behind a path of `depth` see: [length, path + length]."""
    queries = torch.arange(depth, depth + length)[:, None]
    keys = torch.arange(depth - _padded_path(depth), depth + length)
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
    lengths: Sequence[int], heads: int, *, queries: int, path: int = 0
) -> Iterator[list[int]]:
    """Yield groups of numbers of examples whose lengths are alike, the longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = _padded(lengths[groups[-1][0]]) if groups else 0
        scores = (path + longest) * min(longest, queries) * heads
        if (
            groups
            and _padded(lengths[i]) >= ALIKE * longest
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


def _slots(lengths: Sequence[int], starts: Tensor) -> tuple[tuple[int, int], Tensor, Tensor | None]:
    """Return size, tokens and slots of a group."""
    longest = _padded(max(lengths))
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


def causal_square(length: int) -> Tensor:
    """Return what each query sees in causal attention: [length, length] bool."""
    return torch.ones(length, length, dtype=torch.bool).tril_()


class _Attention(torch.autograd.Function):
    """query [N, heads, d], key [N, fewer heads, d], value [N, fewer heads, v] to [N, heads, v]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        scale: float,
        dropout: float,
    ) -> Tensor:
        output, masks = value.new_empty(*query.shape[:2], value.shape[2]), []
        for group in layout.groups:
            q = _take(query, group, key.shape[1])
            k, v = (_take_path(tensor, group) for tensor in (key, value))
            attended = q.new_empty(*q.shape[:3], v.shape[3])
            for block, seen in group.blocks:
                probabilities = _probabilities(
                    q[:, :, block], k[:, 0, seen], group.bias[block, seen], scale
                )
                if dropout:
                    probabilities, mask = torch.native_dropout(probabilities, dropout, True)
                    masks.append(mask)
                attended[:, :, block] = torch.bmm(probabilities, v[:, 0, seen]).view_as(
                    attended[:, :, block]
                )
            _put(output, attended, group)
        ctx.save_for_backward(query, key, value, *masks)
        ctx.layout, ctx.scale, ctx.dropout = layout, scale, dropout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *masks = ctx.saved_tensors
        kept = iter(masks)
        exact = torch.promote_types(query.dtype, torch.float32)
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        if ctx.layout.of_trees:
            grads[1:] = [torch.zeros_like(tensor, dtype=exact) for tensor in (key, value)]
        for group in ctx.layout.groups:
            q = _take(query, group, key.shape[1])
            k, v = (_take_path(tensor, group) for tensor in (key, value))
            do = _take(grad, group, key.shape[1], zero_padding=True)
            dq = torch.empty_like(q)
            dk, dv = (torch.zeros_like(part, dtype=exact) for part in (k, v))
            for block, seen in group.blocks:
                probabilities = _probabilities(
                    q[:, :, block], k[:, 0, seen], group.bias[block, seen], ctx.scale
                )
                queries, outputs = q[:, :, block].flatten(1, 2), do[:, :, block].flatten(1, 2)
                used, slope = probabilities, torch.bmm(outputs, v[:, 0, seen].transpose(1, 2))
                if ctx.dropout:
                    mask = next(kept)
                    used, slope = (
                        native_dropout_backward(t, mask, 1 / (1 - ctx.dropout))
                        for t in (used, slope)
                    )
                scores = torch._softmax_backward_data(
                    slope, probabilities, -1, probabilities.dtype
                ).mul_(ctx.scale)
                dq[:, :, block] = torch.bmm(scores, k[:, 0, seen]).view_as(dq[:, :, block])
                dk[:, 0, seen] += torch.bmm(scores.transpose(1, 2), queries)
                dv[:, 0, seen] += torch.bmm(used.transpose(1, 2), outputs)
            _put(grads[0], dq, group)
            for into, part in zip(grads[1:], (dk, dv), strict=True):
                if ctx.layout.of_trees:
                    _add_path(into, part, group)
                else:
                    _put(into, part, group)
        return *(grad.to(query.dtype) for grad in grads), None, None, None


def _end_to_end(tensor: Tensor) -> Tensor:
    """Return [sequences, heads, length, d] as [sequences * length, heads, d]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _take(tensor: Tensor, group: _Group, shared: int, *, zero_padding: bool = False) -> Tensor:
    """Return the group's tokens of [N, heads, d] as [G * shared, heads / shared, L, d].

    `shared` is the number of key heads.
    """
    (size, length), width = group.size, tensor.shape[2]
    taken = tensor.index_select(0, group.tokens)
    if zero_padding and group.slots is not None:
        taken = torch.zeros_like(taken).index_copy_(0, group.slots, taken[group.slots])
    return (
        taken.view(size, length, shared, -1, width)
        .permute(0, 2, 3, 1, 4)
        .reshape(size * shared, -1, length, width)
    )


def _take_path(tensor: Tensor, group: _Group) -> Tensor:
    """Return the keys that the group sees, of [N, shared, d], as [G * shared, 1, P + L, d]."""
    own = _take(tensor, group, tensor.shape[1])
    if group.path_places is None:
        return own
    path = tensor.index_select(0, group.path_places).transpose(0, 1)
    path = path.expand(group.size[0], -1, -1, -1).flatten(0, 1)
    return torch.cat([path[:, None], own], 2)


def _add_path(into: Tensor, part: Tensor, group: _Group) -> None:
    """Add to [N, shared, d] the gradients [G * shared, 1, P + L, d] of what `_take_path` took."""
    by_node = part.view(group.size[0], -1, *part.shape[2:]).transpose(1, 2)  # [G, P + L, shared, d]
    begin = part.shape[2] - group.size[1]
    for (start, length), own in zip(group.spans, by_node[:, begin:], strict=True):
        into[start : start + length] += own[:length]
    if group.path:
        shared, place = by_node[:, :begin].sum(0), begin - sum(n for _, n in group.path)
        for start, length in group.path:
            into[start : start + length] += shared[place : place + length]
            place += length


def _put(into: Tensor, part: Tensor, group: _Group) -> None:
    """Write what `_take` took back into [N, heads, d]."""
    (size, length), (_, heads, width) = group.size, into.shape
    tokens, back = (
        group.tokens,
        part.view(size, -1, part.shape[1], length, width)
        .permute(0, 3, 1, 2, 4)
        .reshape(-1, heads, width),
    )
    if group.slots is not None:
        tokens, back = tokens[group.slots], back[group.slots]
    into.index_copy_(0, tokens, back.to(into.dtype))


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return the probabilities [B, n * queries, keys] of the keys.

    query [B, n, queries, d], key [B, keys, d], bias [queries, keys].
    """
    bias = bias.to(query.dtype).expand(query.shape[1], -1, -1).flatten(0, 1)
    return torch.baddbmm(bias, query.flatten(1, 2), key.transpose(1, 2), alpha=scale).softmax(-1)
