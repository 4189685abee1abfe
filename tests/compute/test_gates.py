"""Fused gated MLPs against the modules of transformers that they take the place of."""

import copy
import pickle

import pytest
import torch
from torch import nn

from finetune.compute.gates import FusedMLP, fuse_gates
from finetune.models.adapters import add_lora

WITH_GATES = {"llama": "silu", "qwen2": "silu", "gemma3": "gelu_tanh", "granite": "silu"}


def gates(model):
    return [module for module in model.modules() if isinstance(module, FusedMLP)]


def gradients(model, ids, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits.float()
    model.zero_grad()
    logits.square().mean().backward()
    return [logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("kind", "activation"), WITH_GATES.items())
def test_a_model_computes_what_it_computed_to_the_bit(kind, activation, autocast, make_model):
    plain, fused = make_model(kind), make_model(kind)
    fuse_gates(fused)
    assert [gate.activation for gate in gates(fused)] == [activation] * 2
    ids = torch.arange(24).view(2, 12)
    for mine, right in zip(
        gradients(fused, ids, autocast), gradients(plain, ids, autocast), strict=True
    ):
        assert torch.equal(mine, right)
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_gradients_are_the_derivatives(kind, make_model):
    fuse_gates(model := make_model(kind))
    mlp = gates(model)[0].double()
    x = torch.randn(2, 3, mlp.gate_proj.in_features, dtype=torch.float64, requires_grad=True)
    weights = [layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    assert torch.autograd.gradcheck(lambda x, *_: mlp(x), (x, *weights))


def kept(mlp, x):
    """How many tensors of the inner width a forward keeps."""
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    with torch.autocast("cpu", torch.bfloat16), hooks:
        mlp(x)
    shape = (*x.shape[:-1], mlp.gate_proj.out_features)
    return len(
        {tensor.data_ptr() for tensor in saved if tensor.numel() == torch.Size(shape).numel()}
    )


def test_half_as_much_is_kept(make_model):
    plain = make_model("llama").model.layers[0].mlp
    fuse_gates(fused := nn.ModuleList([copy.deepcopy(plain)]))
    x = torch.randn(2, 5, plain.gate_proj.in_features, requires_grad=True)
    assert (kept(plain, x), kept(fused[0], x)) == (4, 2)


def test_a_down_projection_that_does_not_train_gets_no_gradient(make_model):
    plain, fused = make_model("llama"), make_model("llama")
    fuse_gates(fused)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("down_proj" not in name)
    ids = torch.arange(12)[None]
    for mine, right in zip(gradients(fused, ids, False), gradients(plain, ids, False), strict=True):
        assert mine is right is None or torch.equal(mine, right)


def test_what_does_anything_else_stays_as_it_is(make_model):
    class OddMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(8, 16, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(16, 8, bias=False)

        def forward(self, x):
            return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))

    model = nn.ModuleList([OddMLP(), make_model("gpt2"), make_model("gpt_neox")])
    fuse_gates(model)
    assert not gates(model)


@pytest.mark.parametrize("bound", [10.0, 300.0])
def test_a_clamp_of_large_values_is_found_out(bound, make_model):
    class ClampedMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(8, 16, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(16, 8, bias=False)

        def forward(self, x):  # as DeepSeek-V4's
            gate = self.gate_proj(x).clamp(max=bound)
            return self.down_proj(nn.functional.silu(gate) * self.up_proj(x))

    model = nn.ModuleList([ClampedMLP(), make_model("llama", hidden_act="gelu_10")])
    fuse_gates(model)
    assert not gates(model)


@pytest.mark.parametrize(("dropout", "count"), [(0.0, 2), (0.1, 0)])
def test_an_mlp_with_dropout_of_its_own_keeps_it(dropout, count, make_model):
    model = make_model("llama", model_type="seed_oss", residual_dropout=dropout)
    before = torch.get_rng_state()
    fuse_gates(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(gates(model)) == count
    assert not any(layer.mlp.training for layer in model.model.layers)


def test_layers_wrapped_by_lora_are_left_to_peft(make_model):
    def adapted(model):
        wrapped = add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=["down_proj"])
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.1)
        torch.manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                nn.init.normal_(parameter)
        return wrapped

    before, after = make_model("llama"), make_model("llama")
    fuse_gates(before)
    fuse_gates(after := adapted(after))
    assert not gates(after)
    ids = torch.arange(6)[None]
    with_lora = adapted(before)(input_ids=ids).logits
    assert torch.equal(with_lora, after(input_ids=ids).logits)
    assert not torch.allclose(with_lora, make_model("llama")(input_ids=ids).logits)


def test_a_fused_model_can_be_copied_and_pickled(make_model):
    model = make_model("llama")
    fuse_gates(model)
    ids = torch.arange(5)[None]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(gates(copied)) == 2
        assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
