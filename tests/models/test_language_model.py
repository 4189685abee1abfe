"""The wrapped model against transformers' own forward: loss, gradients, packing."""

import logging

import pytest
import torch
from transformers import LlamaForCausalLM

from finetune.data.types import IGNORE_INDEX, targets_of
from finetune.errors import UserError
from finetune.models.language_model import LanguageModel, check_packing, evaluating

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
