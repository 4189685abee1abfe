"""The loss of a causal language model, computed without ever holding the logits of all tokens.

Floor 1: torch only. The shift between hidden states and labels happens here and nowhere else (see `finetune.data.types`).

A vocabulary of V rows and N target tokens make N x V logits, by far the largest tensor of a small model's step. Here the tokens
go through the output head in chunks, and each chunk's gradients are taken while its logits are at hand: 6NVd flops as in the plain
way, no recomputation, chunk x V memory. The idea is Liger's fused linear cross-entropy (https://arxiv.org/abs/2410.10989).
Positions without a target are dropped before the first matrix product.

Why not `torch.nn.functional.linear_cross_entropy`: it is about as fast with an explicit chunk (and up to eight times slower than
the plain way with its default one), but it has no soft cap.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.data.types import IGNORE_INDEX

CHUNK_SIZE = 256
"""Tokens per chunk. Each chunk reads and writes the whole V x d weight gradient, so that chunks under 128 cost time, and larger
ones memory: 256 x V x 4 bytes are 50 MB for V = 49,152 and 268 MB for V = 262,144."""


def causal_lm_loss(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "sum",
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Cross-entropy of the prediction made at each position with the label of the next.

    hidden [rows, length, d], labels [rows, length] int64 (not shifted; IGNORE_INDEX: no target), weight [V, d], bias [V].
    The logits are `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`, without the tanh where softcap is None.
    Returns, in nats, the sum over target tokens ("sum": a scalar with gradients) or each token's loss ("none": [N], no gradients,
    in the order of the rows).
    """
    predicting, targets = _predictions(labels)
    hidden = hidden.flatten(0, 1).index_select(0, predicting)
    if logit_scale != 1.0:
        hidden = hidden * logit_scale
        bias = None if bias is None else bias * logit_scale
    if reduction == "none":
        return token_losses(hidden, weight, targets, bias=bias, softcap=softcap, chunk_size=chunk_size)
    assert reduction == "sum", reduction
    return linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap, chunk_size=chunk_size)


def causal_lm_loss_of_logits(logits: Tensor, labels: Tensor, *, reduction: str = "sum") -> Tensor:
    """As `causal_lm_loss`, from logits [rows, length, V] that a model computes in a way of its own."""
    assert reduction in ("sum", "none"), reduction
    predicting, targets = _predictions(labels)
    chosen = logits.flatten(0, 1).index_select(0, predicting)
    return F.cross_entropy(chosen.to(_softmax_dtype(chosen.dtype)), targets, reduction=reduction)


def _predictions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The shift: the N positions (in the flattened batch) that predict a target token, and those tokens, both [N]."""
    rows, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows * labels.shape[1] + positions, labels[rows, positions + 1]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Sum over N tokens of the cross-entropy of `hidden @ weight.T + bias` with `targets`; a float32 scalar.

    hidden [N, d], weight [V, d], targets [N] int64, bias [V]. Gradients flow to hidden, weight and bias, where they are asked for.
    Under autocast the matrix products are in its dtype; the softmax and the sum of the weight gradient over chunks are in float32.
    The gradients are handed out once: a second `backward` through the same loss raises an AssertionError.
    """
    wanted = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if not (torch.is_grad_enabled() and wanted):
        return token_losses(hidden, weight, targets, bias=bias, softcap=softcap, chunk_size=chunk_size).sum()
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias, softcap, chunk_size)


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """The cross-entropy of each of N tokens, [N] float32, without gradients. Arguments as for `linear_cross_entropy`."""
    dtype = _matmul_dtype(hidden, weight)
    losses = hidden.new_empty(len(targets), dtype=_softmax_dtype(dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for chunk in _chunks(len(targets), chunk_size):
            logits = _logits(hidden[chunk].to(dtype), weight, bias, softcap)
            losses[chunk] = F.cross_entropy(logits, targets[chunk], reduction="none")
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, chunk_size: int
    ) -> Tensor:
        dtype = _matmul_dtype(hidden, weight)
        accumulate = _softmax_dtype(dtype)
        needs_hidden, needs_weight, _, needs_bias, _, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if bias is not None and needs_bias else None
        total = hidden.new_zeros((), dtype=accumulate)
        with torch.autocast(hidden.device.type, enabled=False):
            head, head_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            for chunk in _chunks(len(targets), chunk_size):
                states = hidden[chunk].to(dtype)
                loss, grad = _loss_and_gradient(_logits(states, head, head_bias, softcap), targets[chunk], softcap)
                total += loss
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad @ head
                if grad_weight is not None:
                    _add_product(grad_weight, grad.t(), states)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),  # type: ignore[union-attr]
            None,
            None,
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of linear_cross_entropy are handed out once: no second backward"
        gradients, ctx.gradients = ctx.gradients, None
        # In place: the V x d weight gradient is the largest tensor of the step.
        return tuple(gradient if gradient is None else gradient.mul_(grad_output) for gradient in gradients)


def _loss_and_gradient(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The summed loss of one chunk and its gradient with respect to the logits before the soft cap, [n, V]. Overwrites `logits`."""
    targets = targets[:, None]
    target_logits = logits.gather(1, targets)
    top, argmax = logits.max(1, keepdim=True)
    slope = None if softcap is None else 1 - (logits / softcap).square_()  # of the tanh
    probabilities = torch.softmax(logits, 1, out=logits)
    # log-sum-exp from the largest probability, which is at least 1 / V: one pass over the logits less than taking it apart.
    loss = (top - probabilities.gather(1, argmax).log() - target_logits).sum()
    gradient = probabilities.scatter_add_(1, targets, -torch.ones_like(target_logits))
    return loss, gradient if slope is None else gradient.mul_(slope)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """The logits of one chunk, [n, V], in float32 (float64 for float64)."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(_softmax_dtype(logits.dtype))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with `total` in float32 whatever the dtype of the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunks(length: int, size: int) -> list[slice]:
    assert size >= 1, size
    return [slice(start, start + size) for start in range(0, length, size)]


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
