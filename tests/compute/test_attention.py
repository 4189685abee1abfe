"""Attention as products over examples against one masked call of torch's kernel for the batch."""

import pytest
import torch

from finetune.compute import attention, layout
from finetune.data.types import targets_of
from finetune.models import fuse
from finetune.models.language_model import LanguageModel

PACKABLE = ["gpt2", "llama", "qwen2", "gemma3", "gpt_neox", "phi", "cohere", "granite"]
LENGTHS = ((5, 1, 14), (9, 9, 2))


def packed_batch():
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return ids, targets_of(ids.masked_fill(positions == 0, -100)), positions


def loss_and_gradients(model, batch, monkeypatch, *, kernel=False):
    """The loss, its gradients, and how often our attention was called.

    `kernel`: torch's kernel does all of it instead.
    """
    calls = []
    language_model = LanguageModel(model)
    with monkeypatch.context() as patch:
        if kernel:
            patch.setattr(fuse, "_layout_of", lambda *_: None)
        attend = fuse.attend
        patch.setattr(
            fuse,
            "attend",
            lambda *given, **options: calls.append(given[3].groups) or attend(*given, **options),
        )
        loss = language_model(*batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss, gradients, calls


def assert_same(model, batch, monkeypatch):
    right, right_gradients, none = loss_and_gradients(model, batch, monkeypatch, kernel=True)
    loss, gradients, calls = loss_and_gradients(model, batch, monkeypatch)
    assert not none
    assert len(calls) == model.config.get_text_config().num_hidden_layers
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=1e-5)
    for mine, theirs in zip(gradients, right_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=3e-5)
    return calls


@pytest.mark.parametrize("kind", PACKABLE)
@pytest.mark.parametrize("queries", [256, 4])  # all of an example at a time, or a few
@pytest.mark.parametrize("fused", [(torch.float32,), ()])
def test_loss_and_gradients_are_those_of_one_masked_call(
    kind, queries, fused, make_model, monkeypatch
):
    monkeypatch.setattr(layout, "QUERIES", queries)
    monkeypatch.setattr(layout, "LENGTHS", range(2, 20, 2))
    monkeypatch.setattr(attention, "FUSED", fused)
    calls = assert_same(make_model(kind), packed_batch(), monkeypatch)
    # groups of products, by their padded lengths: 14; 10 and 10; 6; 2 and 2
    assert len(calls[0]) == (5 if fused else 4)


@pytest.mark.parametrize("kind", PACKABLE)
def test_rows_of_one_example_are_attended_to_in_the_same_way(kind, make_model, monkeypatch):
    ids, targets, _ = packed_batch()
    assert_same(make_model(kind), (ids, targets), monkeypatch)


@pytest.mark.parametrize("fused", [(torch.float32,), ()])
def test_a_window_shorter_than_an_example_still_holds(fused, make_model, monkeypatch):
    monkeypatch.setattr(attention, "FUSED", fused)
    model = make_model("gemma3")
    assert model.config.sliding_window < max(n for row in LENGTHS for n in row)
    assert "sliding_attention" in model.config.layer_types
    assert_same(model, packed_batch(), monkeypatch)


def test_bf16_products_are_as_near_to_fp32_as_the_kernels(make_model, monkeypatch):
    model, errors = make_model("llama"), {}
    exact, exact_gradients, _ = loss_and_gradients(model, packed_batch(), monkeypatch)
    for kernel in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients, _ = loss_and_gradients(
                model, packed_batch(), monkeypatch, kernel=kernel
            )
        pairs = zip([loss, *gradients], [exact, *exact_gradients], strict=True)
        errors[kernel] = torch.stack(
            [(mine.float() - right).norm() / right.norm() for mine, right in pairs]
        )
    assert (errors[True] > 0).all()
    assert (errors[False] < 1.5 * errors[True] + 1e-3).all()


def test_dropout_takes_the_share_asked_for_and_its_gradient_is_that_of_what_was_kept():
    torch.manual_seed(0)
    tokens = [torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    examples = layout.plan_layout([4, 2], 2)

    def attend(*tensors):
        torch.manual_seed(1)
        return attention._Products.apply(*tensors, examples, 0.5, 0.3)

    assert torch.autograd.gradcheck(attend, tokens, fast_mode=False)
    value = torch.ones(400, 1, 1)
    examples = layout.plan_layout([1] * 400, 1)
    kept = attention._Products.apply(value, value, value, examples, 1.0, 0.3)
    assert set(kept.flatten().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert 0.2 < (kept == 0).float().mean() < 0.4


def test_the_shapes_of_the_products_are_few():
    """A library that keeps code for each shape it meets would otherwise grow with every step."""
    generator, sizes = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        lengths = torch.randint(1, 257, (30,), generator=generator).tolist()
        groups = layout.plan_layout(lengths, 4).groups
        tokens = torch.cat(
            [group.tokens if group.slots is None else group.tokens[group.slots] for group in groups]
        )
        assert sorted(tokens.tolist()) == list(range(sum(lengths)))
        sizes |= {group.size for group in groups}
    assert len(sizes) <= 30


def test_what_is_no_row_of_examples_goes_to_the_kernel(make_model, monkeypatch):
    """Padding on the left, and a step of generation with its cache."""
    model = make_model("llama")
    LanguageModel(model)
    ids, _, _ = packed_batch()
    calls = []
    attend = fuse.attend
    monkeypatch.setattr(
        fuse, "attend", lambda *given, **options: calls.append(1) or attend(*given, **options)
    )
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0
    )
    assert not calls
    monkeypatch.setattr(fuse, "_layout_of", lambda *_: None)
    assert torch.equal(
        written,
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0),
    )


def test_values_may_be_of_another_width():
    """As in latent attention (DeepSeek-V2)."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, 4, 20, 12),
        torch.randn(2, 2, 20, 12),
        torch.randn(2, 2, 20, 8),
    )
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    examples = layout.plan_layout([20, 20], 4)
    ours = attention.attend(*tensors, examples, scale=None, dropout=0.0)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *tensors, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    slope = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, tensors, slope), torch.autograd.grad(theirs, tensors, slope)
    ):
        torch.testing.assert_close(mine, other)
