"""Choosing the next token: hand-computed distributions, and how often what comes."""

import pytest
import torch

from finetune.inference.sampling import next_tokens, penalise_repetition

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def shares(logits, draws=20_000, **options):
    """How often each token is drawn, from many rows with one generator each way."""
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
    tokens = next_tokens(logits.expand(draws, -1), generators=[generator] * draws, **options)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),  # 0.4 does not reach it, 0.4 + 0.3 does
        ({"top_p": 0.71}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),
        (
            {"top_k": 3, "top_p": 0.5},
            [0, 4 / 7, 0, 3 / 7, 0],
        ),  # top_p of what top_k leaves: 0.4 of 0.85 is 0.47
        ({"temperature": 0.5}, (PROBABILITIES**2 / (PROBABILITIES**2).sum()).tolist()),
    ],
)
def test_tokens_come_as_often_as_computed_by_hand(options, expected):
    found = shares(PROBABILITIES.log(), **options)
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
    assert (found[expected == 0] == 0).all()


def test_temperature_zero_is_greedy_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]])
    assert next_tokens(
        logits, temperature=0.0, top_p=0.5, top_k=1, generators=[generator] * 2
    ).tolist() == [1, 0]
    assert torch.equal(generator.get_state(), before)


def test_a_token_that_cannot_come_never_does():
    logits = torch.tensor([0.0, -torch.inf, 0.0])
    assert shares(logits)[1] == 0


def test_repetition_penalty_lowers_positive_and_negative_logits_of_seen_tokens_only():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


TINY = (1e-308, 5e-324, 1e-45, 1e-38, 1e-20, 1e-10)
HUGE = (1e10, 1e20, 1e38, 1e308)


@pytest.mark.parametrize("how", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
@pytest.mark.parametrize("temperature", TINY)
def test_a_tiny_temperature_takes_the_likeliest_token(temperature, scale, how):
    """The first token is not the likeliest, as NaN would make it, and one cannot come."""
    logits = torch.tensor([-1.0, 2.0, -torch.inf, 1.0, -3.0]) * scale
    for shifted in (logits, logits + 1e3, logits - 1e3):
        assert shares(shifted, draws=50, temperature=temperature, **how)[1] == 1


@pytest.mark.parametrize("temperature", HUGE)
def test_a_huge_temperature_draws_all_possible_tokens_alike(temperature):
    found = shares(torch.tensor([0.0, -torch.inf, 3.0]), temperature=temperature)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0, 0.5]), atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1e-308, 1.0])
@pytest.mark.parametrize("penalty", [*TINY, *HUGE])
def test_an_extreme_repetition_penalty_keeps_the_order_of_the_seen_tokens(penalty, temperature):
    logits = torch.tensor([[-4e3, 0.0, 1e3, 3e3, -torch.inf]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = penalise_repetition(logits.to(dtype), torch.ones(1, 5, dtype=torch.bool), penalty)
        assert not found.isnan().any()
        assert found.argmax() == 3
        assert shares(found[0], draws=50, temperature=temperature)[3] > 0
    unseen = torch.tensor([[False, False, False, True, False]])
    winner = 3 if penalty < 1 else 2
    assert penalise_repetition(logits, unseen, penalty).argmax() == winner
