"""Fused RMS norms against the modules of transformers that they take the place of."""

import copy
import pickle

import pytest
import torch
from torch import nn

from finetune.compute.norms import FusedRMSNorm, fuse_norms

WITH_RMS = {
    "llama": 5,
    "qwen2": 5,
    "gemma3": 13,
    "granite": 5,
}  # norms in two layers, and the last one


def norms(model):
    return [module for module in model.modules() if isinstance(module, FusedRMSNorm)]


def gradients(model, ids, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits.float()
    model.zero_grad()
    logits.square().mean().backward()
    return [logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(("kind", "count"), WITH_RMS.items())
def test_a_model_computes_what_it_computed(kind, count, make_model):
    plain, fused = make_model(kind), make_model(kind)
    fuse_norms(fused)
    assert len(norms(fused)) == count
    ids = torch.arange(24).view(2, 12)
    for mine, right in zip(gradients(fused, ids, False), gradients(plain, ids, False), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    exact = gradients(plain, ids, False)
    errors = [
        torch.stack(
            [
                (value - right).norm() / right.norm()
                for value, right in zip(gradients(model, ids, True), exact, strict=True)
            ]
        )
        for model in (fused, plain)
    ]
    assert errors[0].mean() < 1.3 * errors[1].mean()
    assert list(fused.state_dict()) == list(plain.state_dict())


def test_gradients_are_the_derivatives():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    norm = Gemma3RMSNorm(6)
    fuse_norms(holder := nn.Sequential(norm))
    assert holder[0].one_is_added
    norm.double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))


def test_under_autocast_the_output_is_narrow_and_nothing_wide_is_kept(make_model):
    norm = nn.ModuleList([make_model("llama").model.norm])
    fuse_norms(norm)
    kept = []
    x = torch.randn(4, 32, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with torch.autocast("cpu", torch.bfloat16), hooks:
        assert norm[0](x).dtype == torch.bfloat16
    assert sorted(tensor.numel() for tensor in kept) == [4, 32, 4 * 32]
    assert any(tensor is x for tensor in kept)


def test_what_is_no_rms_norm_or_another_formula_stays_as_it_is(make_model):
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    class OuterRMSNorm(OddRMSNorm):
        """Its epsilon is outside of the root, which only small numbers show."""

        def forward(self, x):
            return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight

    class NoisyRMSNorm(OddRMSNorm):
        """It drops numbers, which evaluation does not show."""

        def forward(self, x):
            normal = nn.functional.rms_norm(x, (8,), self.weight, self.eps)
            return nn.functional.dropout(normal, 0.1, training=self.training)

    odd = [OddRMSNorm(), OuterRMSNorm(), NoisyRMSNorm().eval()]
    model = nn.ModuleList([*odd, nn.LayerNorm(8), make_model("gpt2")])
    fuse_norms(model)
    assert not norms(model)
    assert [type(norm) for norm in odd] == [OddRMSNorm, OuterRMSNorm, NoisyRMSNorm]


def test_a_fused_model_can_be_copied_and_pickled(make_model):
    model = make_model("llama")
    fuse_norms(model)
    ids = torch.arange(5)[None]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(norms(copied)) == 5
        assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
