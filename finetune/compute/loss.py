"""The loss of a causal language model, computed without ever holding the logits of all tokens.

A vocabulary of V rows and N target tokens make N x V logits, by far the largest tensor of a small
model's step. Here the tokens go through the output head in chunks, and each chunk's gradients are
taken while its logits are at hand. That takes 6NVd flops, as in the plain way, no recomputation,
and chunk x V memory. The idea is Liger's fused linear cross-entropy
(https://arxiv.org/abs/2410.10989). Positions without a target are dropped before the first matrix
product.

Rows of the head that do not train (`FrozenRows`) take part in the softmax and get no gradient. If A
of V rows train, that takes 4NVd + 2NAd flops. The frozen rows may be K that are drawn, each with
its logit raised by -log(its chance to be drawn). The partition function is then estimated without
bias, in 6NAd + 4NKd flops (Horvitz-Thompson; sampled softmax: Jean et al.,
https://arxiv.org/abs/1412.2007).

Why not `torch.nn.functional.linear_cross_entropy`: it is no faster than the plain way on a CPU
(`scripts/bench_loss.py`), and has neither frozen rows nor a soft cap.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.compute.products import add_product, buffer, converted, widens, write_product

CHUNK_SIZES = {"cpu": (128, 256, 2**24), "cuda": (256, 4096, 2**27)}
"""Tokens per chunk, at least and at most, and the number of logits aimed at in between.

Each chunk reads and writes the whole V x d weight gradient, so smaller chunks cost time. Larger
ones cost memory: 128 x V x 4 bytes are 134 MB for V = 262,144. On a GPU a chunk of any size is
about twenty kernels, and starting a kernel takes longer than running it. Its logits are 537 MB
there.
"""
CHUNK_MULTIPLE = 64
"""What the length of bfloat16 chunks is padded to a multiple of.

oneDNN keeps 2 MB of code for each shape of a product.
"""


@dataclass(frozen=True)
class FrozenRows:
    """Rows of the output head in addition to the A that train.

    Together they are the whole vocabulary, or an estimate of it.
    """

    weight: Tensor  # [F, d], no gradients
    # [A + F] float32, added to the logits after the soft cap; -inf takes a row out.
    offset: Tensor | None = None


def causal_lm_loss(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    frozen: FrozenRows | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "sum",
    inactive: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the cross-entropy, in nats, of the predictions with the targets.

    hidden [sequences, length, d], targets [N, 2] int64 (places in the flattened batch, and the
    tokens that they predict; a place may predict several), weight [V, d], bias [V]. The logits are
    `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`; if softcap is None there
    is no tanh. With `frozen`, tokens below A are rows of `weight` [A, d], and the others are A + a
    row of `frozen.weight`.

    `reduction`: "sum" gives the sum over targets, a scalar with gradients. "none" gives what
    `token_scores` does: [N, 2] without gradients, in the order of the targets, with `inactive`.
    """
    places, tokens = targets.unbind(1)
    hidden = hidden.flatten(0, 1).index_select(0, places)
    if logit_scale != 1.0:
        hidden = hidden * logit_scale
        bias = None if bias is None else bias * logit_scale
    if reduction == "none":
        options: dict[str, Any] = {
            "bias": bias,
            "frozen": frozen,
            "softcap": softcap,
            "chunk_size": chunk_size,
        }
        return token_scores(hidden, weight, tokens, inactive=inactive, **options)
    assert reduction == "sum", reduction
    return linear_cross_entropy(
        hidden, weight, tokens, bias=bias, frozen=frozen, softcap=softcap, chunk_size=chunk_size
    )


def causal_lm_loss_of_logits(
    logits: Tensor, targets: Tensor, *, reduction: str = "sum", inactive: Tensor | None = None
) -> Tensor:
    """Return what `causal_lm_loss` does, from the logits [sequences, length, V] of a model."""
    assert reduction in ("sum", "none"), reduction
    places, tokens = targets.unbind(1)
    chosen = logits.flatten(0, 1).index_select(0, places)
    chosen = chosen.to(_softmax_dtype(chosen.dtype))
    losses = F.cross_entropy(chosen, tokens, reduction=reduction)
    if reduction == "sum":
        return losses
    masses = (
        torch.zeros_like(losses)
        if inactive is None
        else torch.softmax(chosen, 1) @ inactive.to(chosen.dtype)
    )
    return torch.stack([losses, masses], 1)


@torch.no_grad()
def frozen_square_probabilities(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    frozen: FrozenRows,
    *,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, int]:
    """Return the squared probability of each frozen row, summed over the N targets, and N.

    The first is [F] float32. `targets` [N, 2] as in `causal_lm_loss`.
    """
    hidden = hidden.flatten(0, 1).index_select(0, targets[:, 0]) * logit_scale
    dtype = _matmul_dtype(hidden, weight)
    total = torch.zeros(len(frozen.weight), device=weight.device)
    with torch.autocast(hidden.device.type, enabled=False):
        head = _head(weight, None, frozen, softcap, dtype)
        for chunk in _chunks(len(targets), None, head):
            logits = _logits(_padded(hidden[chunk].to(dtype)), head)
            total += (
                torch.softmax(logits, 1, out=logits)[: len(hidden[chunk]), len(weight) :]
                .square_()
                .sum(0)
            )
    return total, len(targets)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    frozen: FrozenRows | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the sum over N tokens of the cross-entropy of `hidden @ weight.T + bias`, in nats.

    hidden [N, d], weight [V, d], targets [N] int64, bias [V]; `frozen` as in `causal_lm_loss`, not
    together with a bias. The result is a float32 scalar. Gradients flow to those of hidden, weight
    and bias that require them. Under autocast the matrix products are in its dtype; the softmax and
    the sum of the weight gradient over chunks are in float32. The gradients are handed out once: a
    second `backward` through the same loss raises an AssertionError.
    """
    wanted = (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not (torch.is_grad_enabled() and wanted):
        scores = token_scores(
            hidden,
            weight,
            targets,
            bias=bias,
            frozen=frozen,
            softcap=softcap,
            chunk_size=chunk_size,
        )
        return scores[:, 0].sum()
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias, frozen, softcap, chunk_size)


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    frozen: FrozenRows | None = None,
    softcap: float | None = None,
    inactive: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return for each of N tokens the cross-entropy and the probability of `inactive` rows.

    The result is [N, 2] float32, without gradients. `inactive`: bool, for all rows, those of
    `frozen` after those of `weight`; without it the second figure is 0. The other arguments are
    those of `linear_cross_entropy`.
    """
    dtype = _matmul_dtype(hidden, weight)
    scores = hidden.new_zeros(len(targets), 2, dtype=_softmax_dtype(dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        head = _head(weight, bias, frozen, softcap, dtype)
        for chunk in _chunks(len(targets), chunk_size, head):
            logits = _logits(_padded(hidden[chunk].to(dtype)), head)[: len(targets[chunk])]
            scores[chunk, 0] = F.cross_entropy(logits, targets[chunk], reduction="none")
            if inactive is not None:
                scores[chunk, 1] = torch.softmax(logits, 1, out=logits) @ inactive.to(logits.dtype)
    return scores


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy`, with the gradients computed in the forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        frozen: FrozenRows | None,
        softcap: float | None,
        chunk_size: int,
    ) -> Tensor:
        dtype = _matmul_dtype(hidden, weight)
        accumulate = _softmax_dtype(dtype)
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = (
            torch.zeros_like(bias, dtype=accumulate) if bias is not None and needs_bias else None
        )
        total = hidden.new_zeros((), dtype=accumulate)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head(weight, bias, frozen, softcap, dtype)
            for chunk in _chunks(len(targets), chunk_size, head):
                states = _padded(hidden[chunk].to(dtype))
                loss, grad = _loss_and_gradient(_logits(states, head), targets[chunk], head)
                total += loss
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = converted("products", grad, dtype)
                trained = grad[:, : len(weight)]
                if grad_hidden is not None:
                    product = trained @ head.weight
                    product = (
                        product
                        if head.frozen is None
                        else product.addmm_(grad[:, len(weight) :], head.frozen)
                    )
                    grad_hidden[chunk] = product[: len(targets[chunk])]
                if grad_weight is not None:
                    add_product(grad_weight, trained.t(), states)
                del grad, trained  # before the next chunk's logits
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),  # type: ignore[union-attr]
            None,
            None,
            None,
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, (
            "the gradients of linear_cross_entropy are handed out once: no second backward"
        )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: the weight gradient is the largest tensor of the step.
        return tuple(
            gradient if gradient is None else gradient.mul_(grad_output) for gradient in gradients
        )


class _Head(NamedTuple):
    """What turns hidden states into logits, in the dtype of the matrix products."""

    weight: Tensor
    bias: Tensor | None
    frozen: Tensor | None
    offset: Tensor | None
    softcap: float | None

    @property
    def num_rows(self) -> int:
        return len(self.weight) + (0 if self.frozen is None else len(self.frozen))


def _head(
    weight: Tensor,
    bias: Tensor | None,
    frozen: FrozenRows | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> _Head:
    assert bias is None or frozen is None
    bias = None if bias is None else bias.to(dtype)
    rows, offset = (None, None) if frozen is None else (frozen.weight.to(dtype), frozen.offset)
    return _Head(weight.to(dtype), bias, rows, offset, softcap)


def _loss_and_gradient(logits: Tensor, targets: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
    """Return the summed loss of one chunk, and its gradient before the soft cap.

    The gradient is [n, V], as the logits are, and overwrites them. There may be fewer targets than
    n: the rest is padding.
    """
    whole, logits, targets = logits, logits[: len(targets)], targets[:, None]
    target_logits = logits.gather(1, targets)
    top, argmax = logits.max(1, keepdim=True)
    slope = None if head.softcap is None else _slope(logits, head)
    probabilities = torch.softmax(logits, 1, out=logits)
    # log-sum-exp from the largest probability, which is at least 1 / V. Computing it by itself
    # would take one more pass over the logits.
    loss = (top - probabilities.gather(1, argmax).log() - target_logits).sum()
    gradient = probabilities.scatter_add_(1, targets, -torch.ones_like(target_logits))
    if slope is not None:
        gradient.mul_(slope)
    whole[len(targets) :] = 0
    return loss, whole


def _slope(logits: Tensor, head: _Head) -> Tensor:
    """Return the derivative of the soft cap's tanh, from capped logits."""
    assert head.softcap is not None
    # A row taken out has -inf - -inf here; its gradient is zero for any slope.
    if head.offset is not None:
        logits = (logits - head.offset).nan_to_num_()
    return torch.addcmul(logits.new_ones(()), logits, logits, value=-1 / head.softcap**2)


def _logits(hidden: Tensor, head: _Head) -> Tensor:
    """Return the logits of one chunk, [n, V], in float32 (float64 for float64).

    The next chunk's are in the same buffers.
    """
    trained, dtype = len(head.weight), _softmax_dtype(hidden.dtype)
    name, own = ("logits", dtype) if widens(hidden) else ("products", hidden.dtype)
    products = buffer(name, (len(hidden), head.num_rows), own, hidden)
    write_product(hidden, head.weight.t(), products[:, :trained])
    if head.frozen is not None:
        write_product(hidden, head.frozen.t(), products[:, trained:])
    if head.bias is not None:
        products += head.bias
    logits = converted("logits", products, dtype)
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits if head.offset is None else logits.add_(head.offset)


def _chunks(length: int, size: int | None, head: _Head) -> list[slice]:
    if size is None:
        least, most, logits = CHUNK_SIZES.get(head.weight.device.type, CHUNK_SIZES["cuda"])
        size = min(max(logits // head.num_rows, least), most)
    assert size >= 1, size
    return [slice(start, start + size) for start in range(0, length, size)]


def _padded(states: Tensor) -> Tensor:
    """Return the states [n, d] of a chunk, in the dtype of the products, with zeros at the end."""
    missing = (
        -len(states) % CHUNK_MULTIPLE
        if states.dtype == torch.bfloat16 and states.device.type == "cpu"
        else 0
    )
    return F.pad(states, (0, 0, 0, missing)) if missing else states


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
