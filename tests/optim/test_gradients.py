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
def test_is_torchs_on_the_dense_equivalent(max_norm, norm_type):
    params, twins = gradients()
    assert not params[0].grad.is_coalesced()
    norm = clip_grad_norm_(iter(params), max_norm, norm_type)
    torch.testing.assert_close(
        norm, torch.nn.utils.clip_grad_norm_(twins, max_norm, norm_type, foreach=False)
    )
    assert params[0].grad.is_coalesced()
    for param, twin in zip(params, twins):
        torch.testing.assert_close(param.grad.to_dense(), twin.grad)


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
