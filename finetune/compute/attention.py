"""Attention on a CPU, as matrix products over the examples of packed sequences.

torch's fused kernel for the CPU visits every pair of positions in a sequence, also those that the
mask forbids. In bf16 it takes six times as long as the same by `torch.bmm` (`LOG.md`). Here the
examples of a micro-batch are sorted into groups of similar length and padded. Each group and block
of queries takes one product. Only queries, keys and values are kept for the backward pass. It
computes the probabilities again, as the fused kernel does (https://arxiv.org/abs/2205.14135).
Queries share key and value heads without copies of these.
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
ALIKE = 0.75
"""The share of a group's longest example that another one needs to join it.

Padding then costs less than one more product.
"""


@dataclass(frozen=True)
class _Group:
    """G examples, padded to one length L."""

    size: tuple[int, int]  # G, L
    # [G * L] int64: each token's place in the sequences laid end to end; padding has the place of
    # its example's first token.
    tokens: Tensor
    slots: Tensor | None  # [n] int64: those that are not padding; None: all


@dataclass(frozen=True)
class Layout:
    """How a micro-batch is taken apart, the same in all layers that share a mask."""

    groups: list[_Group]
    bias: Tensor  # [longest, longest] float32, added to the scores of every example: 0 or -inf


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
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = _padded(lengths[groups[-1][0]]) if groups else 0
        scores = longest * min(longest, QUERIES) * heads
        if (
            groups
            and _padded(lengths[i]) >= ALIKE * longest
            and (len(groups[-1]) + 1) * scores <= SCORES
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    # What padding sees does not count, but it must see something.
    bias = torch.full((_padded(len(seen)),) * 2, -torch.inf).triu_(1)
    bias[: len(seen), : len(seen)].masked_fill_(~seen, -torch.inf)
    return Layout(
        [
            _group([lengths[i] for i in part], starts[part])
            for group in groups
            for part in _cut(group)
        ],
        bias,
    )


def _padded(length: int) -> int:
    return next((padded for padded in LENGTHS if padded >= length), -(-length // 128) * 128)


def _cut(group: list[int]) -> Iterator[list[int]]:
    """Yield a group in parts of one, two, four ... examples."""
    while group:
        size = 1 << (len(group).bit_length() - 1)
        yield group[:size]
        group = group[size:]


def _group(lengths: Sequence[int], starts: Tensor) -> _Group:
    longest = _padded(max(lengths))
    steps = torch.arange(longest)
    tokens = starts[:, None] + steps.where(steps < torch.tensor(lengths)[:, None], 0)
    slots = (
        None
        if min(lengths) == longest
        else torch.cat([steps[:n] + i * longest for i, n in enumerate(lengths)])
    )
    return _Group((len(lengths), longest), tokens.flatten(), slots)


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
            q, k, v = (_take(tensor, group, key.shape[1]) for tensor in (query, key, value))
            attended = q.new_empty(*q.shape[:3], v.shape[3])
            for block, seen in _blocks(group):
                probabilities = _probabilities(
                    q[:, :, block], k[:, 0, seen], layout.bias[block, seen], scale
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
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for group in ctx.layout.groups:
            q, k, v = (_take(tensor, group, key.shape[1]) for tensor in (query, key, value))
            do = _take(grad, group, key.shape[1], zero_padding=True)
            dq = torch.empty_like(q)
            dk, dv = (torch.zeros_like(part, dtype=torch.float32) for part in (k, v))
            for block, seen in _blocks(group):
                probabilities = _probabilities(
                    q[:, :, block], k[:, 0, seen], ctx.layout.bias[block, seen], ctx.scale
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
            for into, part in zip(grads, (dq, dk, dv), strict=True):
                _put(into, part, group)
        return *grads, None, None, None


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


def _blocks(group: _Group) -> Iterator[tuple[slice, slice]]:
    """Yield queries, and the keys that they may see."""
    for start in range(0, group.size[1], QUERIES):
        end = min(group.size[1], start + QUERIES)
        yield slice(start, end), slice(0, end)


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return the probabilities [B, n * queries, keys] of the keys.

    query [B, n, queries, d], key [B, keys, d], bias [queries, keys].
    """
    bias = bias.to(query.dtype).expand(query.shape[1], -1, -1).flatten(0, 1)
    return torch.baddbmm(bias, query.flatten(1, 2), key.transpose(1, 2), alpha=scale).softmax(-1)
