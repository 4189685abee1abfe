"""Attention on a CPU, over the examples of packed sequences, or the nodes of trees.

torch's own attention visits every pair of positions in a sequence, also those that the mask
forbids. Here each group of a `Layout` is attended to by itself. There are two ways:

- In float32 torch's fused kernel for the CPU takes each group. It was 1.2 to 2.3 times as fast as
  products (`LOG.md`).
- In other dtypes, and with dropout, each block of queries takes one product. In bf16 the fused
  kernel takes six times as long. Only queries, keys and values are kept for the backward pass. It
  computes the probabilities again, as the fused kernel does (https://arxiv.org/abs/2205.14135).

Queries share key and value heads without copies of these. Gradients of keys of trees add up over
all nodes below them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.torch_version import TorchVersion

from finetune.compute.layout import AttentionGroup, Layout

native_dropout_backward = torch.ops.aten.native_dropout_backward
fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

FUSED = (torch.float32,) if TorchVersion(torch.__version__) >= "2.13" else ()
"""The dtypes in which the fused kernel is faster than products.

That it takes keys with fewer heads than queries is tested with torch 2.13, and with none before it.
"""


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
    dtype = _dtype(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        tokens = [_end_to_end(tensor.to(dtype)) for tensor in (query, key, value)]
        if dtype in FUSED and not dropout and value.shape[3] == key.shape[3]:
            output = _Fused.apply(*tokens, layout, scale)
        else:
            output = _Products.apply(*tokens, layout, scale, dropout)
    return output.view(len(query), -1, *output.shape[1:])


def is_fused(query: Tensor) -> bool:
    """Return whether the fused kernel takes a query, for which a layout needs no few shapes."""
    return _dtype(query) in FUSED


def _dtype(query: Tensor) -> torch.dtype:
    """Return the dtype in which attention is computed."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


class _Products(torch.autograd.Function):
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
        output, masks, shared = value.new_empty(*query.shape[:2], value.shape[2]), [], key.shape[1]
        for group in layout.groups:
            q = _by_key_head(_take(query, group), shared)
            k, v = (_by_key_head(_take_path(tensor, group), shared) for tensor in (key, value))
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
            _put(output, _by_token(attended, group), group)
        ctx.save_for_backward(query, key, value, *masks)
        ctx.layout, ctx.scale, ctx.dropout = layout, scale, dropout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *masks = ctx.saved_tensors
        kept, shared = iter(masks), key.shape[1]
        exact = torch.promote_types(query.dtype, torch.float32)
        grads, put_keys = _empty_grads(query, key, value, ctx.layout, exact)
        for group in ctx.layout.groups:
            q = _by_key_head(_take(query, group), shared)
            k, v = (_by_key_head(_take_path(tensor, group), shared) for tensor in (key, value))
            do = _by_key_head(_take(grad, group, zero_padding=True), shared)
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
            _put(grads[0], _by_token(dq, group), group)
            for into, part in zip(grads[1:], (dk, dv), strict=True):
                put_keys(into, _by_token(part, group), group)
        return *(grad.to(query.dtype) for grad in grads), None, None, None


class _Fused(torch.autograd.Function):
    """As `_Products` in float32, by torch's fused kernel. Values are as wide as keys."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        output, sums = torch.empty_like(query), []
        for group in layout.groups:
            q = _take(query, group).transpose(1, 2)
            k, v = (_take_path(tensor, group).transpose(1, 2) for tensor in (key, value))
            attended = torch.empty_like(q)
            for block, seen, options in _calls(group):
                attended[:, :, block], kept = fused(
                    q[:, :, block], k[:, :, seen], v[:, :, seen], **options, scale=scale
                )
                sums.append(kept)
            _put(output, attended.transpose(1, 2), group)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *sums = ctx.saved_tensors
        kept = iter(sums)
        grads, put_keys = _empty_grads(query, key, value, ctx.layout, query.dtype)
        for group in ctx.layout.groups:
            q, o = (_take(tensor, group).transpose(1, 2) for tensor in (query, output))
            k, v = (_take_path(tensor, group).transpose(1, 2) for tensor in (key, value))
            do = _take(grad, group, zero_padding=True).transpose(1, 2)
            dq, dk, dv = (torch.zeros_like(part) for part in (q, k, v))
            for block, seen, options in _calls(group):
                inner = [do[:, :, block], q[:, :, block], k[:, :, seen], v[:, :, seen]]
                of_query, of_key, of_value = fused_backward(
                    *inner, o[:, :, block], next(kept), **options, scale=ctx.scale
                )
                dq[:, :, block] = of_query
                dk[:, :, seen] += of_key
                dv[:, :, seen] += of_value
            _put(grads[0], dq.transpose(1, 2), group)
            for into, part in zip(grads[1:], (dk, dv), strict=True):
                put_keys(into, part.transpose(1, 2), group)
        return *grads, None, None


def _calls(group: AttentionGroup) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Yield the queries, the keys and the mask of each call of the fused kernel."""
    if group.is_causal:  # the kernel passes over what the queries may not see
        every = slice(0, group.size[1])
        yield every, every, {"dropout_p": 0.0, "is_causal": True}
        return
    for block, seen in group.blocks:
        mask = group.bias[block, seen].expand(group.size[0], 1, -1, -1)
        yield block, seen, {"dropout_p": 0.0, "is_causal": False, "attn_mask": mask}


def _end_to_end(tensor: Tensor) -> Tensor:
    """Return [sequences, heads, length, d] as [sequences * length, heads, d]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _take(tensor: Tensor, group: AttentionGroup, *, zero_padding: bool = False) -> Tensor:
    """Return the group's tokens of [N, heads, d] as [G, L, heads, d]."""
    taken = tensor.index_select(0, group.tokens)
    if zero_padding and group.slots is not None:
        taken = torch.zeros_like(taken).index_copy_(0, group.slots, taken[group.slots])
    return taken.view(*group.size, *tensor.shape[1:])


def _take_path(tensor: Tensor, group: AttentionGroup) -> Tensor:
    """Return the keys that the group sees, of [N, shared, d], as [G, P + L, shared, d]."""
    own = _take(tensor, group)
    if group.path_places is None:
        return own
    path = tensor.index_select(0, group.path_places)
    return torch.cat([path.expand(group.size[0], -1, -1, -1), own], 1)


def _by_key_head(taken: Tensor, shared: int) -> Tensor:
    """Return [G, L, heads, d] as [G * shared, heads / shared, L, d], for `shared` key heads."""
    by_head = taken.unflatten(2, (shared, -1)).permute(0, 2, 3, 1, 4)
    return by_head.reshape(-1, *by_head.shape[2:])


def _by_token(part: Tensor, group: AttentionGroup) -> Tensor:
    """Return what `_by_key_head` returned as [G, L, heads, d] again."""
    return part.unflatten(0, (group.size[0], -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _empty_grads(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, exact: torch.dtype
) -> tuple[list[Tensor], Callable[[Tensor, Tensor, AttentionGroup], None]]:
    """Return room for the gradients, and what puts those of a group's keys and values there.

    Gradients of keys of trees are added up, in `exact`.
    """
    if not layout.of_trees:
        return [torch.empty_like(tensor) for tensor in (query, key, value)], _put
    zeros = (torch.zeros_like(tensor, dtype=exact) for tensor in (key, value))
    return [torch.empty_like(query), *zeros], _add_path


def _put(into: Tensor, part: Tensor, group: AttentionGroup) -> None:
    """Write what `_take` took, [G, L, heads, d], back into [N, heads, d]."""
    tokens, back = group.tokens, part.flatten(0, 1)
    if group.slots is not None:
        tokens, back = tokens[group.slots], back[group.slots]
    into.index_copy_(0, tokens, back.to(into.dtype))


def _add_path(into: Tensor, part: Tensor, group: AttentionGroup) -> None:
    """Add to [N, shared, d] the gradients [G, P + L, shared, d] of what `_take_path` took."""
    begin = part.shape[1] - group.size[1]
    for (start, length), own in zip(group.spans, part[:, begin:], strict=True):
        into[start : start + length] += own[:length]
    if group.path:
        of_path, place = part[:, :begin].sum(0), begin - sum(n for _, n in group.path)
        for start, length in group.path:
            into[start : start + length] += of_path[place : place + length]
            place += length


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return the probabilities [B, n * queries, keys] of the keys.

    query [B, n, queries, d], key [B, keys, d], bias [queries, keys].
    """
    bias = bias.to(query.dtype).expand(query.shape[1], -1, -1).flatten(0, 1)
    return torch.baddbmm(bias, query.flatten(1, 2), key.transpose(1, 2), alpha=scale).softmax(-1)
