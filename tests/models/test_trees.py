"""Examples that share beginnings against the same examples alone, in every family."""

import re

import pytest
import torch
from hypothesis import given, settings

from finetune.data.batches.trees import collate_trees, count_tokens, plan_trees
from finetune.data.types import targets_of
from finetune.models import fuse
from finetune.models.adapters import add_lora
from finetune.models.language_model import LanguageModel
from finetune.models.load import ModelSpec, load_model, load_skeleton
from finetune.models.probes import tree_obstacle, why_no_trees
from finetune.models.speed import enable_activation_checkpointing
from finetune.models.vocabulary.activate import activate_vocabulary
from tests.data.test_trees import related_examples
from tests.models.conftest import HEADS, KINDS, SMALL

WINDOW = {"sliding_window": 7}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {  # of every kind of attention: (config, implementation)
    **{kind: (KINDS[kind], "sdpa") for kind in KINDS if kind != "bloom"},
    "mistral": ({"model_type": "mistral", **SMALL, **HEADS, **WINDOW}, "sdpa"),
    "phi3": ({"model_type": "phi3", **SMALL, **HEADS, **WINDOW, "pad_token_id": 0}, "sdpa"),
    "qwen2 window": (
        {"model_type": "qwen2", **SMALL, **HEADS, **MIXED, "use_sliding_window": True},
        "sdpa",
    ),
    "qwen3": ({"model_type": "qwen3", **SMALL, **HEADS, "head_dim": 8}, "sdpa"),
    "gemma": ({"model_type": "gemma", **SMALL, **HEADS, "head_dim": 8}, "sdpa"),
    "gemma2": (
        {
            "model_type": "gemma2",
            **SMALL,
            **HEADS,
            **MIXED,
            "head_dim": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
        "eager",
    ),
    "llama eager": (KINDS["llama"], "eager"),
    "olmo2": ({"model_type": "olmo2", **SMALL, **HEADS}, "sdpa"),
    "olmo3": ({"model_type": "olmo3", **SMALL, **HEADS, **MIXED}, "sdpa"),
    "smollm3": ({"model_type": "smollm3", **SMALL, **HEADS}, "sdpa"),
    "opt": (
        {
            "model_type": "opt",
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
            "dropout": 0.0,
        },
        "sdpa",
    ),
    "stablelm": ({"model_type": "stablelm", **SMALL, **HEADS}, "sdpa"),
    "starcoder2": ({"model_type": "starcoder2", **SMALL, **HEADS, **WINDOW}, "sdpa"),
    "cohere2": ({"model_type": "cohere2", **SMALL, **HEADS, **MIXED}, "sdpa"),
    "mixtral": (
        {"model_type": "mixtral", **SMALL, **HEADS, "num_local_experts": 2},
        "sdpa",
    ),
}
ROOMY = {"gpt2": {"n_positions": 128}}


def make(family, **options):
    config, implementation = FAMILIES[family]
    given = config | ROOMY.get(family, {}) | options
    torch.manual_seed(0)
    model = load_model(ModelSpec(config=given, vocab_size=97, attn_implementation=implementation))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.normal_(std=0.2)
    return model


def alone(language_model, examples):
    """The sum of the losses of the examples, each of them by itself."""
    total = 0.0
    for each in examples:
        ids, labels = (torch.tensor([list(part)]) for part in (each.input_ids, each.labels))
        total = total + language_model(ids, targets_of(labels))
    return total


def assert_same(language_model, examples, *, loss_error, gradient_error):
    """Assert that trees compute fewer tokens to the same loss and gradients; return the loss."""
    forests = plan_trees(examples, capacity=200)
    if forests is None:
        return None
    assert sum(map(count_tokens, forests)) < sum(map(len, examples))
    parameters = [p for p in language_model.parameters() if p.requires_grad]
    right = alone(language_model, examples)
    expected = torch.autograd.grad(right, parameters, allow_unused=True)
    loss = sum(language_model(**collate_trees(forest, examples, pad_id=0)) for forest in forests)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert abs(loss.item() - right.item()) <= loss_error * abs(right.item())
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert mine is None
            continue
        assert (mine - theirs).abs().max() <= gradient_error * theirs.abs().max() + 1e-12
    return loss.item()


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=4)
@given(examples=related_examples())
def test_random_trees_have_the_loss_and_gradients_of_their_examples(family, examples):
    model = make(family)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    language_model = LanguageModel(model).double()
    # Some norms and rotary angles of transformers are float32 for any model.
    exact = {"gpt2", "llama", "qwen2", "gpt_neox", "gemma3"}
    assert_same(
        language_model,
        examples,
        loss_error=1e-10 if family in exact else 1e-6,
        gradient_error=1e-6,
    )


def prompts_of(shared, own, count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    from finetune.data.types import Example

    stem = torch.randint(1, 97, (shared,), generator=generator).tolist()
    found = []
    for _ in range(count):
        rest = torch.randint(1, 97, (own,), generator=generator).tolist()
        labels = [-100] * (shared + own // 3) + rest[own // 3 :]
        found.append(Example(stem + rest, labels))
    return found


@pytest.mark.parametrize("family", sorted(f for f in FAMILIES if FAMILIES[f][1] == "sdpa"))
def test_the_products_are_those_of_trees_in_every_layer(family, monkeypatch):
    language_model, kinds = LanguageModel(make(family)), []
    attend = fuse.attend
    monkeypatch.setattr(
        fuse,
        "attend",
        lambda *given, **options: kinds.append(given[3].of_trees) or attend(*given, **options),
    )
    (forest,) = plan_trees(prompts_of(20, 9, 3), capacity=200)
    language_model(**collate_trees(forest, prompts_of(20, 9, 3), pad_id=0))
    assert kinds == [True] * 2


@pytest.mark.parametrize("mode", ["lora", "checkpointing", "active", "unfused"])
def test_what_else_a_step_may_do_keeps_the_loss_and_the_gradients(mode):
    model = make("llama")
    if mode == "lora":
        options = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": "all-linear"}
        model = add_lora(model, **options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    if mode == "active":
        activate_vocabulary(model, range(0, 97, 2))
    language_model = LanguageModel(model)
    if mode == "unfused":
        language_model.fused = False
    if mode == "checkpointing":
        enable_activation_checkpointing(language_model)
        language_model.train()
    language_model.double()
    assert_same(language_model, prompts_of(30, 12, 5), loss_error=1e-10, gradient_error=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_bf16_gradients_are_as_near_to_float32_as_without_sharing(family):
    language_model, examples = LanguageModel(make(family)), prompts_of(40, 12, 8)
    parameters = list(language_model.parameters())
    (forest,) = plan_trees(examples, capacity=500)
    batch = collate_trees(forest, examples, pad_id=0)
    exact = torch.autograd.grad(alone(language_model, examples), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.autograd.grad(alone(language_model, examples), parameters)
        shared = torch.autograd.grad(language_model(**batch), parameters)
    for tree, each, right in zip(shared, plain, exact, strict=True):
        error, usual = ((found - right).norm() / right.norm() for found in (tree, each))
        assert usual > 0
        assert error <= 1.25 * usual + 1e-3


def test_a_model_is_checked_against_its_examples_alone():
    for family in ("llama", "gemma3", "llama eager", "opt"):
        assert why_no_trees(LanguageModel(make(family))) is None
    language_model = LanguageModel(make("llama"))
    forward = language_model._run
    language_model._run = lambda module, ids, *_: forward(module, ids)
    assert "differ by up to" in why_no_trees(language_model)


def test_a_window_that_only_the_config_knows_is_found_out():
    """Moshi's masks have no window. The probe is shorter than any window that models have."""
    torch.manual_seed(0)
    config = {
        "model_type": "moshi",
        **SMALL,
        **HEADS,
        "head_dim": 8,
        "ffn_dim": 64,
        "initializer_range": 0.2,
        "max_position_embeddings": 128,
    }
    del config["intermediate_size"]
    made = load_model(ModelSpec(config={**config, "sliding_window": 70}, vocab_size=97))
    assert "differ by up to" in (why_no_trees(LanguageModel(made)) or "")
    assert made.config.sliding_window == 70
    windowed = load_model(
        ModelSpec(
            config={"model_type": "mistral", **SMALL, **HEADS, "sliding_window": 70}, vocab_size=97
        )
    )
    assert why_no_trees(LanguageModel(windowed)) is None


STATE = "its layers carry a state along the sequence"
PLACES = "counts? places instead of positions"
REFUSED = {
    "bloom": (KINDS["bloom"], PLACES),
    "mpt": ({"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2}, PLACES),
    "gpt_neo": (
        {
            "model_type": "gpt_neo",
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        PLACES,
    ),
    "falcon": (
        {
            "model_type": "falcon",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
        },
        PLACES,
    ),
    "mamba": ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, STATE),
    "rwkv": ({"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 2}, STATE),
    "qwen3_next": ({"model_type": "qwen3_next", **SMALL, **HEADS, "num_experts": 2}, STATE),
    "lfm2": ({"model_type": "lfm2", **SMALL, **HEADS, "layer_types": ["conv", "conv"]}, STATE),
    "llama4": (
        {"model_type": "llama4_text", **SMALL, **HEADS, "head_dim": 8, "num_local_experts": 2},
        "chunked attention counts places",
    ),
    "rotary scaling that switches": (
        KINDS["llama"]
        | {
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 64,
            },
        },
        "its rotary scaling is another one for examples beyond 64 tokens",
    ),
    "dropout": (KINDS["gpt2"] | {"resid_pdrop": 0.1}, "dropout would be drawn once"),
    "attention dropout": (KINDS["llama"] | {"attention_dropout": 0.1}, "dropout would be drawn"),
    "dropout by another name": (
        FAMILIES["starcoder2"][0] | {"residual_dropout": 0.1},
        "dropout would be drawn once",
    ),
    "routers' loss": (
        FAMILIES["mixtral"][0] | {"output_router_logits": True},
        "its routers' loss would count once",
    ),
    "router noise": (
        FAMILIES["mixtral"][0] | {"router_jitter_noise": 0.1},
        "noise would be drawn once",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_share_is_refused_with_its_sentence(kind):
    config, sentence = REFUSED[kind]
    silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = (silent | config) if config["model_type"] == "gpt2" else config
    model = load_skeleton(ModelSpec(config=config, vocab_size=97))
    assert re.search(sentence, tree_obstacle(model, max_length=100) or "")


def test_the_refused_kinds_are_counted_and_the_others_have_no_obstacle():
    assert len(REFUSED) == 15
    assert len(FAMILIES) >= 20
    for family, (config, implementation) in FAMILIES.items():
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        given = none | config if config["model_type"] == "gpt2" else config
        model = load_skeleton(
            ModelSpec(config=given, vocab_size=97, attn_implementation=implementation)
        )
        assert tree_obstacle(model, max_length=32) is None, family
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "target_modules": "all-linear"}
    assert "dropout" in (tree_obstacle(add_lora(make("llama"), **lora), max_length=32) or "")
