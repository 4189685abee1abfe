"""The wrapped model against transformers' own forward: loss, gradients, packing."""

import logging

import pytest
import torch
from transformers import LlamaForCausalLM

from finetune.data.types import IGNORE_INDEX, targets_of
from finetune.errors import UserError
from finetune.models.language_model import LanguageModel, evaluating
from finetune.models.load import ModelSpec, load_model
from finetune.models.probes import check_packing
from finetune.models.vocabulary.activate import activate_vocabulary

PACKABLE = ["gpt2", "llama", "qwen2", "gemma3", "gpt_neox", "phi", "cohere", "granite"]


def batch(rows=2, length=12, vocab_size=97):
    ids = torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0] = labels[0, 5:8] = IGNORE_INDEX
    return ids, labels, int((labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("kind", [*PACKABLE, "bloom"])
def test_loss_and_gradients_are_those_of_transformers(kind, make_model):
    model = make_model(kind)
    language_model = LanguageModel(model)
    assert language_model.fused
    ids, labels, count = batch()
    theirs = model(input_ids=ids, labels=labels).loss * count
    ours = language_model(ids, targets_of(labels))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    parameters = list(model.parameters())
    for mine, right in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    each = language_model.token_losses(ids, targets_of(labels))
    assert each.shape == (count,)
    assert not each.requires_grad
    torch.testing.assert_close(each.sum(), ours.detach())


def test_right_padding_changes_nothing(make_model):
    language_model = LanguageModel(make_model("llama"))
    ids, labels, _ = batch()
    padded = (
        torch.nn.functional.pad(ids, (0, 5), value=3),
        targets_of(torch.nn.functional.pad(labels, (0, 5), value=IGNORE_INDEX)),
    )
    torch.testing.assert_close(
        language_model.token_losses(*padded),
        language_model.token_losses(ids, targets_of(labels)),
    )


@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_examples_have_the_losses_and_gradients_of_the_examples_alone(kind, make_model):
    language_model = LanguageModel(make_model(kind))
    check_packing(language_model)
    lengths = (4, 1, 6, 9)
    ids = torch.randint(0, 97, (2, sum(lengths)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    labels = ids.masked_fill(positions == 0, IGNORE_INDEX)
    alone = sum(
        language_model(piece, targets_of(own))
        for piece, own in zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)
    )
    packed = language_model(ids, targets_of(labels), positions)
    leaking = language_model(ids, targets_of(labels))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert (leaking - alone).abs() > 1e-2  # the test sees a leak
    parameters = list(language_model.parameters())
    for mine, right in zip(
        torch.autograd.grad(packed, parameters), torch.autograd.grad(alone, parameters), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)


def test_a_model_that_leaks_between_packed_examples_is_refused(make_model):
    with pytest.raises(
        UserError, match=r"BloomForCausalLM with eager attention .* Set data.packing: false"
    ):
        check_packing(LanguageModel(make_model("bloom")))


class Squared(LlamaForCausalLM):
    """A model that does to its logits what nobody could know."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits * output.logits.abs()
        return output


def test_a_model_with_logits_of_its_own_goes_through_its_own_forward_and_says_so(
    make_model, caplog
):
    model = Squared(make_model("llama").config).eval()
    with caplog.at_level(logging.WARNING, logger="finetune.models.language_model"):
        language_model = LanguageModel(model)
    assert not language_model.fused
    assert len(caplog.records) == 1
    assert "Squared computes its logits in a way of its own" in caplog.text
    ids, labels, count = batch()
    logits = model(input_ids=ids).logits
    right = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(language_model(ids, targets_of(labels)), right)
    assert language_model.token_losses(ids, targets_of(labels)).shape == (count,)


class Capped(LlamaForCausalLM):
    """A model that caps its logits where small random weights never get."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


@pytest.mark.parametrize("known", [False, True])
def test_a_cap_is_found_out_before_the_logits_grow(known, make_model):
    config = make_model("llama").config
    if known:
        config.logits_soft_cap = 30.0  # as RecurrentGemma's config has it
    torch.manual_seed(0)
    model = Capped(config).eval()
    language_model = LanguageModel(model)
    assert language_model.fused == known
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(500)
    ids, labels, _ = batch()
    right = model(input_ids=ids, labels=labels)
    assert right.logits.abs().max() > 25
    expected = torch.nn.functional.cross_entropy(
        right.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(language_model(ids, targets_of(labels)), expected)


class NormHead(torch.nn.Linear):
    """A head whose forward is more than a product with its weight (Baichuan 2)."""

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, torch.nn.functional.normalize(self.weight))


def test_a_head_that_changes_its_weight_is_not_taken_for_a_product(make_model):
    model = make_model("llama")
    head = NormHead(32, 97, bias=False)
    head.weight = model.get_output_embeddings().weight
    model.set_output_embeddings(head)
    ids, labels, count = batch()
    language_model = LanguageModel(model)
    assert not language_model.fused
    theirs = model(input_ids=ids, labels=labels).loss * count
    torch.testing.assert_close(language_model(ids, targets_of(labels)), theirs)
    with pytest.raises(UserError, match="no plain embedding with a linear output head"):
        activate_vocabulary(model, [1, 2, 3])


def test_building_and_checking_leave_mode_and_random_state_alone(make_model):
    model = make_model("gpt2")
    model.train()
    model.transformer.h[0].eval()
    before = torch.get_rng_state()
    check_packing(LanguageModel(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.transformer.h[0].training
    with evaluating(model):
        assert not any(module.training for module in model.modules())


def test_autocast_reaches_decoder_and_loss(make_model):
    language_model = LanguageModel(make_model("llama"))
    ids, labels, _ = batch()
    exact = language_model(ids, targets_of(labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = language_model(ids, targets_of(labels))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs() < 0.02 * exact
    rounded.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in language_model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_float64_model_is_read_in_float64(make_model, kind):
    model = make_model(kind).double()
    ids = torch.randint(5, 97, (1, 12))
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    theirs = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    ours = LanguageModel(model)(ids, targets_of(ids))
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-7)


def test_norms_and_gates_of_one_class_are_looked_at_one_by_one():
    """Gemma 4 has norms of one class with and without a weight."""
    config = {
        "model_type": "gemma4_text",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size_per_layer_input": 120,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "sliding_window": 16,
    }
    torch.manual_seed(0)
    model = load_model(ModelSpec(config=config, vocab_size=97))
    ids = torch.randint(5, 97, (2, 20))
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits
        LanguageModel(model)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, theirs)


@pytest.mark.parametrize("inherits", [False, True])
def test_an_indexer_s_choice_of_keys_is_kept(inherits):
    """DeepSeek-V3.2's kind puts it into the mask for attention of two names only."""
    config = {
        "model_type": "deepseek_v32",
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "index_topk": 8,
        "index_n_heads": 16,
        "index_head_dim": 8,
    }
    torch.manual_seed(0)
    model = load_model(ModelSpec(config=config, vocab_size=97, attn_implementation="sdpa"))
    if inherits:  # in a module of its own, such as a notebook's, whose code cannot be read
        model.__class__ = type("Mine", (type(model),), {"__module__": "__main__"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    ids = torch.randint(5, 97, (1, 40))
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits
        LanguageModel(model)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, theirs)
