"""Gated MLPs (SwiGLU, GeGLU: https://arxiv.org/abs/2002.05202) that keep half for the backward.

`down(act(gate(x)) * up(x))` keeps four tensors of the inner width: the outputs of gate and up, the
activation, and the product that goes into down. Here the first two are kept. The backward computes
the others again, so results are the same to the bit.
"""

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.compute.subclass import in_both_modes, likeness_of, put_before

aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, str]]] = {
    "silu": (aten.silu, aten.silu_backward, {}),
    "gelu": (aten.gelu, aten.gelu_backward, {"approximate": "none"}),
    "gelu_tanh": (aten.gelu, aten.gelu_backward, {"approximate": "tanh"}),
}
GATE_SCALES = (3.0, 1e2, 1e4)
"""How large the numbers are with which a module is tried: some clamp what is large."""


def fuse_gates(model: nn.Module) -> None:
    """Let the gated MLPs of `model` compute in this way, in place.

    A module counts as one by its class's name and its layers, if it gives the same on random
    numbers up to rounding, small and large, in training too. Any other module stays as it is, and
    so does one whose layers are wrapped later (LoRA). `down_proj` is not called: a hook on it does
    not run.
    """
    tried: dict[Hashable, str | None] = {}
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("MLP") and not isinstance(module, FusedMLP) and _is_plain(module):
            if (kind := likeness_of(module)) not in tried:
                tried[kind] = _activation(module)
            if (activation := tried[kind]) is not None:
                put_before(module, FusedMLP, activation=activation)


class FusedMLP(nn.Module):
    """The class that is put before a gated MLP's own class."""

    activation: str
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] to the same shape."""
        device = x.device.type
        if device not in ("cpu", "cuda") or torch.compiler.is_compiling() or not _is_plain(self):
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        weight = self.down_proj.weight.to(gate.dtype)
        with torch.autocast(device, enabled=False):
            return _GatedDown.apply(gate, up, weight, self.activation)


class _GatedDown(torch.autograd.Function):
    """gate and up [..., inner], weight [d, inner] to [..., d]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.activation = activation
        activate, _, options = ACTIVATIONS[activation]
        return F.linear(activate(gate, **options).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        activate, of_activation, options = ACTIVATIONS[ctx.activation]
        activated, of_product = activate(gate, **options), grad @ weight
        of_gate = of_activation(of_product * up, gate, **options)
        of_up = of_product.mul_(activated)
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = grad.flatten(0, -2).t() @ activated.mul_(up).flatten(0, -2)
        return of_gate, of_up, of_weight, None


def _is_plain(module: Any) -> bool:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(layer) is nn.Linear for layer in layers) and layers[2].bias is None  # type: ignore[union-attr]


@torch.no_grad()
def _activation(module: Any) -> str | None:
    """Return the activation between the layers of `module`, which may be without data.

    None if it is not a known one, or if the module does anything else.
    """
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        )
    scales = torch.tensor(GATE_SCALES).repeat_interleave(4)[:, None]
    x = scales * torch.randn(len(scales), probe.gate_proj.in_features, generator=generator)
    both = in_both_modes(probe, x)
    for name in ACTIVATIONS:
        ours = _GatedDown.apply(probe.gate_proj(x), probe.up_proj(x), probe.down_proj.weight, name)
        if all(theirs.shape == ours.shape and _are_close(theirs, ours) for theirs in both):
            return name
    return None


def _are_close(theirs: Tensor, ours: Tensor) -> bool:
    """Return whether each row differs by rounding only, however large its numbers are."""
    largest = theirs.abs().amax(dim=-1, keepdim=True)
    return bool(((theirs - ours).abs() <= 1e-5 * largest + 1e-12).all())
