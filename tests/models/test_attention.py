"""Attention example by example against one masked call for the whole batch."""

import pytest
import torch

from finetune.models import attention
from finetune.models.language_model import LanguageModel

PACKABLE = ["gpt2", "llama", "qwen2", "gemma3", "gpt_neox", "phi", "cohere", "granite"]
LENGTHS = ((5, 1, 14), (9, 9, 2))


def packed_batch():
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return ids, ids.masked_fill(positions == 0, -100), positions


def loss_and_gradients(model, monkeypatch, call_cost):
    """The loss, its gradients, and the shapes of the queries that reached the kernel."""
    shapes = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def seen(query, *rest, **options):
        shapes.append(tuple(query.shape[::2]))
        return kernel(query, *rest, **options)

    language_model = LanguageModel(model)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "CALL_COST", call_cost)
        patch.setattr(attention, "scaled_dot_product_attention", seen)
        loss = language_model(*packed_batch())
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss, gradients, shapes


@pytest.mark.parametrize("kind", PACKABLE)
def test_loss_and_gradients_are_those_of_one_masked_call(kind, make_model, monkeypatch):
    model = make_model(kind)
    whole, whole_gradients, no_shapes = loss_and_gradients(model, monkeypatch, 10**12)
    each, gradients, shapes = loss_and_gradients(model, monkeypatch, 0)
    layers = model.config.get_text_config().num_hidden_layers
    assert not no_shapes
    assert shapes == [(1, n) for row in LENGTHS for n in row] * layers
    torch.testing.assert_close(each, whole, rtol=1e-6, atol=1e-5)
    for mine, right in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_a_window_shorter_than_an_example_still_holds(make_model, monkeypatch):
    model = make_model("gemma3")
    assert model.config.sliding_window < max(n for row in LENGTHS for n in row)
    assert "sliding_attention" in model.config.layer_types
    whole, _, _ = loss_and_gradients(model, monkeypatch, 10**12)
    each, _, _ = loss_and_gradients(model, monkeypatch, 0)
    torch.testing.assert_close(each, whole, rtol=1e-6, atol=1e-5)


def test_padded_rows_and_generation_go_the_usual_way(make_model, monkeypatch):
    model = make_model("llama")
    ids, labels, _ = packed_batch()
    language_model = LanguageModel(model)

    def refuse(*_, **__):
        raise AssertionError("rows that are not packed were taken apart")

    monkeypatch.setattr(attention, "CALL_COST", 0)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", refuse)
    assert language_model(ids, labels).isfinite()
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(written[:, : ids.shape[1]], ids)
