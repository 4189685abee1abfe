"""Parameter groups: what decays, at which lr, and that nothing is forgotten or taken twice."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from finetune.errors import UserError
from finetune.optim import build_optimizer

SIZES = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16, **SIZES))


def llama(layers=2):
    config = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False, **config, **SIZES)
    )


class Misnamed(nn.Module):
    """Names that say one thing, modules that are another."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Linear(3, 3)  # no norm
        self.embedding_bias = nn.Linear(3, 3, bias=False)  # neither
        self.projection = nn.BatchNorm1d(3)  # a norm
        self.head = nn.Embedding(5, 3)  # an embedding
        self.attention = nn.MultiheadAttention(3, 1)
        self.scale = nn.Parameter(torch.ones(()))  # a scalar


def decays(optimizer):
    return {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def lrs(optimizer):
    return {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize("make", [gpt2, llama, Misnamed])
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "lion"])
@pytest.mark.parametrize("frozen", [(), ("0", "norm"), ("head",)], ids=str)
@pytest.mark.parametrize("no_decay", [None, (), ("norm",), ("weight",)], ids=str)
def test_every_trainable_parameter_is_in_one_group(make, name, frozen, no_decay):
    model = make()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in parameter_name for part in frozen))
    optimizer = build_optimizer(model, name, weight_decay=0.1, no_decay=no_decay)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert len(held) == len(set(held)) == len(trainable)
    by_name = {
        n: p
        for group in optimizer.param_groups
        for n, p in zip(group["param_names"], group["params"], strict=True)
    }
    assert all(by_name[name] is parameter for name, parameter in trainable.items())
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)


def test_the_kind_follows_from_the_module_and_not_from_the_name():
    model = Misnamed()
    everything = {name for name, _ in model.named_parameters()}
    without = {
        "norm": {"projection.weight", "projection.bias"},
        "embedding": {"head.weight"},
        "bias": {"scale", "norm.bias", "attention.in_proj_bias", "attention.out_proj.bias"},
        "weight": {
            "norm.weight",
            "embedding_bias.weight",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
        },
    }
    assert set.union(*without.values()) == everything
    for kind, names in without.items():
        decayed = decays(build_optimizer(model, "adamw", weight_decay=0.1, no_decay=(kind,)))
        assert {name for name, decay in decayed.items() if decay == 0} == names
    default = decays(build_optimizer(model, "adamw", weight_decay=0.1))
    assert {name for name, decay in default.items() if decay == 0.1} == without["weight"]
    assert set(decays(build_optimizer(model, "adamw", weight_decay=0.1, no_decay=())).values()) == {
        0.1
    }


def test_norms_of_transformers_are_norms_and_a_tied_table_is_an_embedding():
    assert {
        n
        for n, d in decays(build_optimizer(llama(), "adamw", no_decay=("norm",))).items()
        if d == 0
    } == {
        *(
            f"model.layers.{layer}.{norm}.weight"
            for layer in (0, 1)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
        "model.norm.weight",
    }
    tied = gpt2()
    names = decays(build_optimizer(tied, "adamw"))
    assert names["transformer.wte.weight"] == 0
    assert "lm_head.weight" not in names
    assert names["transformer.h.0.attn.c_attn.weight"] == 0.01
    assert decays(build_optimizer(llama(), "adamw"))["lm_head.weight"] == 0.01


def test_the_groups_do_not_depend_on_values():
    groups = [
        [
            (group["name"], group["param_names"])
            for group in build_optimizer(gpt2(), "adamw", lr=lr, weight_decay=decay).param_groups
        ]
        for lr, decay in ((1e-3, 0.1), (1e-4, 0.0))
    ]
    assert groups[0] == groups[1]
    assert [name for name, _ in groups[0]] == ["no decay", "decay"]


def test_names_and_settings_survive_the_state_dict():
    optimizer = build_optimizer(gpt2(), "adamw", overrides=[{"pattern": "*.wpe.*", "lr": 0.5}])
    saved = optimizer.state_dict()["param_groups"]
    assert [group["name"] for group in saved] == ["no decay", "no decay, *.wpe.*", "decay"]
    assert saved[1]["param_names"] == ["transformer.wpe.weight"]
    assert saved[1]["lr"] == 0.5


def test_overrides_are_final_and_the_last_that_matches_wins():
    model = llama()
    optimizer = build_optimizer(
        model,
        "adamw",
        lr=1.0,
        weight_decay=0.1,
        layer_decay=0.5,
        overrides=[
            {"pattern": "model.layers.*", "lr": 0.3},
            {"pattern": "*.norm.weight", "weight_decay": 0.7},
            {"pattern": "*.1.*.down_proj.weight", "lr": 0.2, "weight_decay": 0.0},
        ],
    )
    assert lrs(optimizer)["model.layers.0.mlp.up_proj.weight"] == 0.3
    assert lrs(optimizer)["model.layers.1.mlp.down_proj.weight"] == 0.2
    assert decays(optimizer)["model.layers.1.mlp.down_proj.weight"] == 0.0
    assert decays(optimizer)["model.layers.0.mlp.down_proj.weight"] == 0.1
    assert decays(optimizer)["model.norm.weight"] == 0.7
    assert lrs(optimizer)["model.embed_tokens.weight"] == 0.125


def test_layer_decay_lowers_lr_from_the_head_to_the_embedding():
    for model, embedding, block, top in (
        (
            llama(3),
            "model.embed_tokens.weight",
            "model.layers.{}.self_attn.q_proj.weight",
            ["model.norm.weight", "lm_head.weight"],
        ),
        (
            gpt2(),
            "transformer.wte.weight",
            "transformer.h.{}.attn.c_attn.weight",
            ["transformer.ln_f.weight"],
        ),
    ):
        optimizer = build_optimizer(model, "sgd", lr=8.0, layer_decay=0.5)
        layers = model.config.num_hidden_layers
        assert [lrs(optimizer)[name] for name in top] == [8.0] * len(top)
        assert [lrs(optimizer)[block.format(layer)] for layer in reversed(range(layers))] == [
            4.0,
            2.0,
            1.0,
        ][:layers]
        assert lrs(optimizer)[embedding] == 8.0 * 0.5 ** (layers + 1)


class TwoStacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.decoder = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])])


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        (
            lambda: nn.Linear(2, 2),
            {"layer_decay": 0.5},
            "layer_decay needs a model with one stack of layers (an nn.ModuleList), and found none",
        ),
        (
            TwoStacks,
            {"layer_decay": 0.5},
            "layer_decay needs a model with one stack of layers (an nn.ModuleList), and found "
            "several: enc",
        ),
        (
            gpt2,
            {"overrides": [{"pattern": "wte*", "lr": 1.0}]},
            "the override pattern 'wte*' matches no trainable parameter; "
            "one of them is 'transformer.wte.weight'",
        ),
        (
            lambda: nn.Linear(2, 2).requires_grad_(False),
            {},
            "there is nothing to train: every parameter is frozen",
        ),
        (list, {}, "there is nothing to train"),
        (
            lambda: nn.Linear(2, 2).parameters(),
            {"no_decay": ("bias",)},
            "no_decay and layer_decay go by the modules of a model",
        ),
        (
            lambda: nn.Linear(2, 2).parameters(),
            {"overrides": [{"pattern": "*t", "lr": 1.0}]},
            "the override pattern '*t' matches no",
        ),
        (
            lambda: ["weight"],
            {},
            "an optimizer takes a model, parameters or parameter groups, but was given 'str'",
        ),
        (
            lambda: [nn.Parameter(torch.ones(1)), {"params": []}],
            {},
            "parameters and group dicts are mixed",
        ),
        (
            lambda: [{"params": [p]} for p in [nn.Parameter(torch.ones(1))] * 2],
            {},
            "a parameter is in the groups 0 and 1. Put each",
        ),
    ],
)
def test_mistakes_are_answered_with_a_sentence(source, options, sentence):
    with pytest.raises(UserError) as caught:
        build_optimizer(source(), "adamw", **options)
    assert str(caught.value).startswith(sentence)


def test_a_pattern_that_matches_only_frozen_parameters_is_an_error():
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    with pytest.raises(UserError, match="matches no trainable parameter"):
        build_optimizer(model, "adamw", overrides=[{"pattern": "*.wpe.weight", "lr": 1.0}])


def test_parameters_pairs_and_dicts_are_taken_as_torch_takes_them():
    layer = nn.Linear(2, 2)
    (group,) = build_optimizer(
        [*layer.parameters(), layer.weight], "adamw", weight_decay=0.1
    ).param_groups
    assert [group["params"], group["weight_decay"], group["name"]] == [
        [layer.weight, layer.bias],
        0.1,
        "all",
    ]
    (group,) = build_optimizer(layer.named_parameters(), "adamw").param_groups
    assert group["param_names"] == ["weight", "bias"]
    layer.bias.requires_grad_(False)
    extra = nn.Parameter(torch.ones(1))
    first, second = build_optimizer(
        [
            {"params": layer.parameters(), "lr": 0.5},
            {"params": extra, "name": "extra", "betas": (0.5, 0.9)},
        ],
        "adamw",
        lr=0.1,
    ).param_groups
    assert [first["params"], first["lr"], first["name"]] == [[layer.weight], 0.5, "group 0"]
    assert [second["params"], second["lr"], second["name"], second["betas"]] == [
        [extra],
        0.1,
        "extra",
        (0.5, 0.9),
    ]


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    for model, count in ((llama(), 2 * 7), (gpt2(), 2 * 4)):
        groups = build_optimizer(model, "muon").param_groups
        under = {
            rule: [n for g in groups if g["rule"] == rule for n in g["param_names"]]
            for rule in ("muon", "adamw")
        }
        assert len(under["muon"]) == count
        assert all(".layers." in name or ".h." in name for name in under["muon"])
        assert all(dict(model.named_parameters())[name].ndim == 2 for name in under["muon"])
    assert "lm_head.weight" not in under["muon"]
    weight, bias = nn.Linear(2, 2).parameters()
    groups = build_optimizer([weight, bias], "muon").param_groups
    assert [(group["rule"], group["params"]) for group in groups] == [
        ("muon", [weight]),
        ("adamw", [bias]),
    ]
