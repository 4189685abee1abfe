"""The chunked loss against plain cross-entropy: values, gradients, dtypes, and the memory saved."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.compute import products
from finetune.compute.loss import FrozenRows, causal_lm_loss, linear_cross_entropy, token_scores
from finetune.data.types import IGNORE_INDEX, targets_of


def problem(tokens=37, width=8, vocabulary=23, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden, weight, bias, targets


def plain(hidden, weight, targets, bias=None, softcap=None, reduction="sum"):
    logits = (
        F.linear(hidden, weight, bias).float()
        if hidden.dtype != torch.float64
        else F.linear(hidden, weight, bias)
    )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction=reduction)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 8, 37, 256])
def test_equals_plain_cross_entropy_in_value_and_gradients(softcap, with_bias, chunk_size):
    hidden, weight, bias, targets = problem()
    bias = bias if with_bias else None
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    expected = plain(hidden, weight, targets, bias, softcap)
    loss = linear_cross_entropy(
        hidden, weight, targets, bias=bias, softcap=softcap, chunk_size=chunk_size
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        gradients(loss * 0.3, *tensors), gradients(expected * 0.3, *tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    each = token_scores(hidden, weight, targets, bias=bias, softcap=softcap, chunk_size=chunk_size)
    torch.testing.assert_close(
        each[:, 0],
        plain(hidden, weight, targets, bias, softcap, "none").detach(),
        rtol=1e-6,
        atol=1e-6,
    )
    assert not each[:, 1].any()  # not asked for
    inactive = torch.arange(len(weight)) % 3 == 1
    scores = token_scores(
        hidden,
        weight,
        targets,
        bias=bias,
        softcap=softcap,
        inactive=inactive,
        chunk_size=chunk_size,
    )
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(
        scores[:, 1], torch.softmax(logits, 1)[:, inactive].sum(1).detach(), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(scores[:, 0], each[:, 0])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 8, 256])
def test_frozen_rows_take_part_in_the_softmax_and_get_no_gradient(softcap, chunk_size):
    hidden, weight, _, targets = problem()
    trained, frozen = weight.detach()[:9].requires_grad_(), weight.detach()[9:]
    expected = plain(hidden, weight, targets, softcap=softcap)
    loss = linear_cross_entropy(
        hidden, trained, targets, frozen=FrozenRows(frozen), softcap=softcap, chunk_size=chunk_size
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    (to_hidden, to_trained), (hidden_grad, weight_grad) = (
        gradients(loss, hidden, trained),
        gradients(expected, hidden, weight),
    )
    torch.testing.assert_close(to_hidden, hidden_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_trained, weight_grad[:9], rtol=1e-5, atol=1e-6)
    options = {"frozen": FrozenRows(frozen), "softcap": softcap, "chunk_size": chunk_size}
    scores = token_scores(
        hidden, trained, targets, inactive=torch.arange(len(weight)) >= 9, **options
    )
    logits = (
        F.linear(hidden, weight)
        if softcap is None
        else softcap * torch.tanh(F.linear(hidden, weight) / softcap)
    )
    torch.testing.assert_close(
        scores[:, 1], torch.softmax(logits, 1)[:, 9:].sum(1).detach(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(scores[:, 0].sum(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_offsets_raise_logits_and_take_rows_out(softcap):
    hidden, weight, _, _ = problem()
    targets = torch.zeros(len(hidden), dtype=torch.long)
    trained, frozen = weight.detach()[:9].requires_grad_(), weight.detach()[9:]
    offset = torch.zeros(23)
    offset[4], offset[9:15], offset[20] = -torch.inf, 1.7, -torch.inf
    logits = F.linear(hidden, weight)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = offset.isfinite()
    expected = F.cross_entropy((logits + offset)[:, kept], targets, reduction="sum")
    loss = linear_cross_entropy(
        hidden, trained, targets, frozen=FrozenRows(frozen, offset), softcap=softcap
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    (to_hidden, to_trained), (hidden_grad, weight_grad) = (
        gradients(loss, hidden, trained),
        gradients(expected, hidden, weight),
    )
    torch.testing.assert_close(to_hidden, hidden_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_trained, weight_grad[:9], rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 6),
    st.integers(2, 30),
    st.integers(1, 9),
    st.floats(0.01, 40.0),
)
def test_any_shape_and_scale_in_float64(tokens, width, vocabulary, chunk_size, scale):
    hidden, weight, _, targets = problem(tokens, width, vocabulary, dtype=torch.float64)
    expected = plain(hidden * scale, weight, targets)
    loss = linear_cross_entropy(hidden * scale, weight, targets, chunk_size=chunk_size)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(
        gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    loss = linear_cross_entropy(torch.zeros(5, 3), torch.randn(7, 3), torch.arange(5))
    torch.testing.assert_close(loss, 5 * torch.tensor(7.0).log())


def test_huge_logits_do_not_overflow():
    hidden = torch.tensor([[1e4]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor(2e4))
    torch.testing.assert_close(gradients(loss, hidden)[0], torch.tensor([[2.0]]))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_is_exact(frozen):
    hidden, weight, _, targets = problem()
    expected_hidden, expected_weight = gradients(plain(hidden, weight, targets), hidden, weight)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets).backward()
    trained, still, expected = (
        (weight, hidden, expected_weight)
        if frozen == "hidden"
        else (hidden, weight, expected_hidden)
    )
    assert still.grad is None
    torch.testing.assert_close(trained.grad, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_handed_out_once():
    hidden, weight, _, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="handed out once"):
        loss.backward()


def test_no_gradient_is_computed_without_grad_mode():
    hidden, weight, _, targets = problem()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_autocast_multiplies_in_bf16_and_sums_in_float32():
    hidden, weight, _, targets = problem(tokens=600, vocabulary=50)
    exact = plain(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_size=128)
        rounded = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, rounded, rtol=1e-5, atol=0)  # the same products in bf16
    ours, theirs = gradients(loss, hidden, weight), gradients(exact, hidden, weight)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() < 0.02 * right.norm()


def test_bf16_tensors_give_a_float32_loss_and_bf16_gradients():
    hidden, weight, _, targets = problem(dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in gradients(loss, hidden, weight)] == [torch.bfloat16] * 2


def test_the_weight_gradient_of_many_chunks_is_summed_in_float32():
    """1,000 equal contributions of about 1 would stop growing at 256 in bf16."""
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(
        hidden, weight, torch.zeros(1000, dtype=torch.long), chunk_size=1
    ).backward()
    torch.testing.assert_close(
        weight.grad.float().flatten(),
        torch.tensor([-2000.0, 1000.0, 1000.0]) / 3,
        rtol=0.01,
        atol=0,
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_causal_loss_shifts_once_drops_unlabelled_positions_and_scales(softcap):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(3, 6, 4, requires_grad=True),
        torch.randn(9, 4, requires_grad=True),
        torch.randn(9),
    )
    labels = torch.randint(0, 9, (3, 6))
    labels[:, 0] = labels[1, 2:5] = labels[2] = IGNORE_INDEX
    logits = 0.25 * F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(
        logits[:, :-1].reshape(-1, 9),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    options = {"bias": bias, "softcap": softcap, "logit_scale": 0.25}
    loss = causal_lm_loss(hidden, targets_of(labels), weight, **options)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    each = causal_lm_loss(hidden, targets_of(labels), weight, reduction="none", **options)
    assert each.shape == ((labels != IGNORE_INDEX).sum(), 2)
    torch.testing.assert_close(each[:, 0].sum(), expected.detach())


def test_a_batch_without_targets_has_zero_loss_and_zero_gradients():
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = causal_lm_loss(hidden, torch.empty(0, 2, dtype=torch.int64), weight)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest number of bytes that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_logits_of_all_tokens_are_never_held(softcap):
    tokens, vocabulary, chunk_size = 512, 300, 16
    hidden, weight, _, targets = problem(tokens, 4, vocabulary)
    with LargestTensor() as largest:
        linear_cross_entropy(
            hidden, weight, targets, softcap=softcap, chunk_size=chunk_size
        ).backward()
        token_scores(hidden, weight, targets, softcap=softcap, chunk_size=chunk_size)
    assert 0 < largest.bytes <= 4 * chunk_size * vocabulary < 4 * tokens * vocabulary
    with LargestTensor() as largest:
        plain(hidden, weight, targets, softcap=softcap).backward()
    assert largest.bytes == 4 * tokens * vocabulary  # the probe sees what it is there to see


def test_the_memory_that_is_kept_carries_nothing_from_one_loss_to_the_next():
    """Of other sizes and dtypes, in the first place under inference mode."""
    hidden, weight, _, targets = problem()
    products.release()
    with torch.inference_mode():
        token_scores(hidden, weight, targets)
    for tokens, vocabulary, dtype in (
        (37, 23, torch.float32),
        (9, 90, torch.float64),
        (50, 11, torch.float32),
        (37, 23, torch.bfloat16),
    ):
        hidden, weight, _, targets = problem(tokens, vocabulary=vocabulary)
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
        loss = linear_cross_entropy(*inputs, targets)
        exact = plain(hidden.double(), weight.double(), targets)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=tolerance)
        for mine, right in zip(
            gradients(loss, *inputs), gradients(exact, hidden, weight), strict=True
        ):
            torch.testing.assert_close(mine, right.to(dtype), rtol=tolerance, atol=5 * tolerance)
