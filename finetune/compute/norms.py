"""RMS normalisation (https://arxiv.org/abs/1910.07467) in fewer passes over memory.

It also keeps less for the backward. The modules of transformers are about five operators each. They
keep the input, the normalised input and, under autocast, one narrow copy of the output for every
linear layer that reads it: 14 bytes a number. Here only the input is kept. Under autocast the
output comes in its dtype, so those layers share it: 6 bytes. On CUDA torch has one kernel for
it.
"""

import copy
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.compute.subclass import in_both_modes, likeness_of, put_before

NORM_SCALES = (1e-3, 3.0, 1e4)
"""How large the numbers are with which a module is tried: a small one shows where epsilon is."""


def fuse_norms(model: nn.Module) -> None:
    """Let the RMS norms of `model` compute in this way, in place.

    A module counts as one by its class's name, if it gives the same on random numbers up to
    rounding, in training too. Any other module stays as it is.
    """
    tried: dict[Hashable, bool | None] = {}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, FusedRMSNorm):
            if (kind := likeness_of(module)) not in tried:
                tried[kind] = _one_is_added(module)
            if (added := tried[kind]) is not None:
                put_before(module, FusedRMSNorm, one_is_added=added)


class FusedRMSNorm(nn.Module):
    """The class that is put before a norm's own class: x / sqrt(mean(x²) + eps) · weight.

    If `one_is_added` (Gemma), the factor is 1 + weight.
    """

    one_is_added: bool
    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] to the same shape, in the dtype of x or of autocast; float32 inside."""
        device = x.device.type
        if device not in ("cpu", "cuda") or torch.compiler.is_compiling():
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            weight = 1 + self.weight if self.one_is_added else self.weight
            if device == "cpu":
                return _RMSNorm.apply(x, weight, _epsilon(self), dtype)
            exact = _exact(x)
            return F.rms_norm(x.to(exact), weight.shape, weight.to(exact), _epsilon(self)).to(dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_exact(x))
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse
        of_weight = normal * grad
        shares = torch.matmul(of_weight, weight.to(of_weight.dtype))[..., None].div_(x.shape[-1])
        of_x = (grad * weight.to(of_weight.dtype)).addcmul_(normal, shares, value=-1).mul_(inverse)
        return of_x.to(x.dtype), of_weight.flatten(0, -2).sum(0).to(weight.dtype), None, None


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _epsilon(module: Any) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


@torch.no_grad()
def _one_is_added(module: Any) -> bool | None:
    """Return whether the class of `module` adds one to its weight; None if it is neither formula.

    `module` may be without data.
    """
    weight = getattr(module, "weight", None)
    if (
        weight is None
        or weight.dim() != 1
        or [name for name, _ in module.named_parameters()] != ["weight"]
    ):
        return None
    if not hasattr(module, "variance_epsilon") and not isinstance(
        getattr(module, "eps", None), float
    ):
        return None
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    probe.weight.copy_(torch.randn(len(weight), generator=generator))
    scales = torch.tensor(NORM_SCALES).repeat_interleave(4)[:, None]
    x = scales * torch.randn(len(scales), len(weight), generator=generator, dtype=torch.float32)
    both = in_both_modes(probe, x)
    for added in (False, True):
        ours = _RMSNorm.apply(
            x, 1 + probe.weight if added else probe.weight, _epsilon(probe), x.dtype
        )
        if all(
            theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-5)
            for theirs in both
        ):
            return added
    return None
