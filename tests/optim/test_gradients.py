"""Clipping over dense and row-sparse gradients together."""

import pytest
import torch
from torch import nn

from finetune.optim.gradients import clip_grad_norm_


def gradients(dtype=torch.float64):
    """A sparse gradient with rows hit several times, and a dense one; and the same, dense."""
    torch.manual_seed(0)
    sparse, dense = nn.Embedding(10, 3, sparse=True, dtype=dtype), nn.Linear(3, 2, dtype=dtype)
    for ids in ([1, 1, 4], [4, 9]):
        dense(sparse(torch.tensor(ids))).sin().sum().backward()
    params = [sparse.weight, *dense.parameters()]
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    for param, twin in zip(params, twins):
        twin.grad = param.grad.to_dense().clone()
    return params, twins


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_is_torchs_on_the_dense_equivalent(max_norm, norm_type, foreach):
    params, twins = gradients()
    assert not params[0].grad.is_coalesced()
    norm = clip_grad_norm_(iter(params), max_norm, norm_type, foreach=foreach)
    torch.testing.assert_close(
        norm, torch.nn.utils.clip_grad_norm_(twins, max_norm, norm_type, foreach=foreach)
    )
    assert params[0].grad.is_coalesced()
    for param, twin in zip(params, twins):
        torch.testing.assert_close(param.grad.to_dense(), twin.grad)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("alone", [False, True], ids=["beside a dense one", "alone"])
def test_a_row_sparse_gradient_without_rows_counts_as_zero(norm_type, alone):
    """An empty batch, or one of padding only."""
    module = nn.Embedding(4, 3, sparse=True, padding_idx=0, dtype=torch.float64)
    module(torch.zeros(0, dtype=torch.long)).sum().backward()
    other = nn.Parameter(torch.ones(2, dtype=torch.float64))
    other.grad = torch.tensor([-3.0, 4.0], dtype=torch.float64)
    params = [module.weight] if alone else [module.weight, other]
    norm = clip_grad_norm_(params, 1.0, norm_type)
    expected = 0.0 if alone else float(torch.linalg.vector_norm(torch.tensor([3.0, 4]), norm_type))
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(expected)
    assert module.weight.grad.coalesce().values().shape == (0, 3)


def test_a_thousand_bfloat16_ones_are_a_thousand():
    module = nn.Embedding(3, 1, sparse=True, dtype=torch.bfloat16)
    module(torch.ones(1000, dtype=torch.long)).sum().backward()
    assert clip_grad_norm_(module.weight, 1e9).item() == 1000
    assert module.weight.grad.dtype == torch.bfloat16


def test_a_norm_that_is_not_finite():
    params, _ = gradients()
    params[1].grad[0, 0] = float("nan")
    assert clip_grad_norm_(params, 1.0).isnan()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)


def test_nothing_to_clip():
    assert clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0).item() == 0
