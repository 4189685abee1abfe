"""Options and numbers at the edge: each as under dense AdamW, or refused in a sentence."""

import copy
import logging

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim.lazy.adamw import LazyAdamW
from finetune.optim.lazy.missed_steps import GaussRules, History, replay_
from finetune.optim.lazy.state import RowState

ROWS, WIDTH = 12, 4


def pair(dtype=torch.float64, **options):
    """Return (embedding, LazyAdamW) and (embedding, torch.optim.AdamW) with the same weights."""
    torch.manual_seed(0)
    modules = [nn.Embedding(ROWS, WIDTH, dtype=dtype) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    options = {"lr": 0.05, "weight_decay": 0.3, **options}
    lazy = LazyAdamW(modules[0].parameters(), embeddings=[modules[0]], **options)
    options.pop("missed_steps", None)
    dense = torch.optim.AdamW(modules[1].parameters(), foreach=False, **options)
    return (modules[0], lazy), (modules[1], dense)


def step(module, optimizer, ids, scale=1.0):
    optimizer.zero_grad()
    (module(torch.tensor(ids)).sin().sum() * scale).backward()
    optimizer.step()


def train(pairs, steps, scale=1.0):
    for number in steps:
        for module, optimizer in pairs:
            step(module, optimizer, [0, 1 + number % 5], scale)


def difference(pairs):
    (module, _), (twin, _) = pairs
    return float((module.state_dict()["weight"] - twin.weight.detach()).abs().max())


# Betas

REFUSED = [(0.95, 0.95), (0.9, 0.9), (0.98, 0.98), (0.5, 0.5), (0.9, 0.85), (0.9, 0.82)]
REFUSED += [(0.99, 0.985), (0.3, 0.1), (0.0, 0.0), (0.9, 0.0), (0.99, 0.9)]
TAKEN = [(0.9, 0.999), (0.9, 0.99), (0.9, 0.98), (0.9, 0.95), (0.95, 0.98), (0.95, 0.99)]
TAKEN += [(0.5, 0.9), (0.8, 0.9), (0.0, 0.9), (0.0, 1e-3), (0.95, 0.9999)]


def worst(betas, dtype, warm_up, eps=1e-8, steps=300):
    """Return the largest error of what rows left at steps 1, 10 and 100 missed, as a part of it."""
    history = History(betas, eps)
    for number in range(steps):
        history.record(1e-3 * ((number + 1) / steps if warm_up else 1.0), 0.0)
    root = torch.logspace(-4, 8, 61, dtype=torch.float64).repeat(3) * eps
    last_step = torch.tensor([1, 10, 100]).repeat_interleave(61)
    rows = [torch.zeros(len(root), 1, dtype=torch.float64), (root * 0.5)[:, None]]
    rows.append(root.square()[:, None])
    replayed, ruled = ([x.clone() for x in rows] for _ in range(2))
    replay_(*replayed, last_step, history)
    rules = GaussRules(history, dtype=dtype, device=torch.device("cpu"))
    ruled = [x.to(dtype) for x in rows]
    rules.coefficients(last_step, len(last_step))[0].catch_up_(*ruled)
    return float(((ruled[0] - replayed[0]) / replayed[0].abs().clamp_min(1e-300)).abs().max())


SLOW = [pytest.param(betas, marks=pytest.mark.slow) for betas in TAKEN[2:]]


@pytest.mark.parametrize("betas", [*TAKEN[:2], *SLOW])
@pytest.mark.parametrize("warm_up", [False, True])
def test_exact_is_a_millionth_of_what_was_missed_for_all_betas_that_are_taken(betas, warm_up):
    assert GaussRules.supports(betas)
    if betas[0] == 0:
        return  # without momentum nothing drifts
    assert worst(betas, torch.float64, warm_up) <= 1e-6
    assert worst(betas, torch.float32, warm_up, eps=1e-3) <= 2e-6


@pytest.mark.parametrize("betas", REFUSED)
def test_betas_for_which_no_rule_is_exact_are_refused(betas):
    module = nn.Embedding(ROWS, WIDTH)
    with pytest.raises(UserError, match=r'Use missed_steps="replay"'):
        LazyAdamW(module.parameters(), betas=betas, embeddings=[module])


@pytest.mark.parametrize("betas", REFUSED)
def test_replay_takes_them_bit_for_bit(betas):
    pairs = pair(betas=betas, missed_steps="replay")
    train(pairs, range(40))
    assert difference(pairs) == 0


@pytest.mark.parametrize("betas", TAKEN)
def test_rows_end_where_dense_adamw_has_them(betas):
    pairs = pair(betas=betas)
    train(pairs, range(40))
    train(pairs, range(40, 60), scale=1e-6)
    for _ in range(150):
        for module, optimizer in pairs:
            step(module, optimizer, [0])
    assert difference(pairs) <= 1e-7


# Learning rates, weight decay


@pytest.mark.parametrize("lr", [-1e-9, -0.05, float("nan")])
def test_a_negative_lr_in_mid_run_is_refused_and_nothing_is_lost(lr):
    pairs = pair()
    train(pairs, range(10))
    (module, optimizer), _ = pairs
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="lr must be at least 0"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05
    train(pairs, range(10, 30))
    assert difference(pairs) <= 1e-12


def test_a_schedule_that_ends_below_zero_after_the_last_step():
    pairs = pair()
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
        for _, optimizer in pairs
    ]
    for number in range(21):
        train(pairs, [number])
        for schedule in schedules:
            schedule.step()
    assert pairs[0][1].param_groups[0]["lr"] < 0
    assert difference(pairs) <= 1e-12


def test_a_negative_weight_decay_in_mid_run():
    pairs = pair()
    train(pairs, range(10))
    for _, optimizer in pairs:
        optimizer.param_groups[0]["weight_decay"] = -0.1
    train(pairs, range(10, 40))
    assert difference(pairs) <= 1e-12


# Number types


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing(default):
    def train_all():
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"table": nn.Embedding(ROWS, 16), "dense": nn.Linear(16, 3, bias=False)}
        ).float()
        for parameter in model.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel(), dtype=torch.float32).view_as(
                parameter
            )
        optimizer = LazyAdamW(
            model.parameters(), lr=1e-3, weight_decay=0.1, embeddings=[model["table"]]
        )
        for number in range(300):  # bfloat16 counts to 256
            optimizer.zero_grad()
            model["dense"](model["table"](torch.tensor([0, 1 + number % 5]))).sin().sum().backward()
            optimizer.step()
        state = optimizer.state_dict()["state"]
        again = copy.deepcopy((model, optimizer))
        again[1].load_state_dict(optimizer.state_dict())
        assert [int(entry["step"]) for entry in state.values()] == [300, 300]
        return model.state_dict()

    expected = train_all()
    torch.set_default_dtype(default)
    try:
        found = train_all()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name


def test_steps_past_what_float32_counts():
    """2 ** 24 + 1 is no float32."""
    (module, optimizer), (twin, oracle) = pair(torch.float32)
    start = (1 << 24) - 3
    rows = torch.arange(6)
    moments = [torch.full((6, WIDTH), 1e-3), torch.full((6, WIDTH), 1e-6)]
    table = module.row_table
    table.start(
        module.weight,
        RowState.up_to_date(start, rows, *moments, betas=(0.9, 0.999), eps=1e-8),
    )
    optimizer.state[module.weight] = table.live
    dense = [torch.zeros(ROWS, WIDTH).index_copy_(0, rows, x) for x in moments]
    oracle.state[twin.weight] = {"step": torch.tensor(float(start)), "exp_avg": dense[0]}
    oracle.state[twin.weight]["exp_avg_sq"] = dense[1]
    for number in range(6):
        for each, stepper in ((module, optimizer), (twin, oracle)):
            step(each, stepper, [0, 1 + number])
    assert table.step_count == start + 6
    for block in (optimizer.deferred, optimizer.flushed):
        with block():
            state = optimizer.state_dict()
        assert int(state["state"][0]["step"]) == start + 6
    with optimizer.deferred():
        weights, state = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    (other, resumed), _ = pair(torch.float32)
    with resumed.deferred():
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
    for each, stepper in ((module, optimizer), (twin, oracle), (other, resumed)):
        step(each, stepper, [0, 5])
        step(each, stepper, [1, 6])
    assert torch.equal(other(torch.arange(ROWS)), module(torch.arange(ROWS)))
    torch.testing.assert_close(
        module.state_dict()["weight"], twin.weight.detach(), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_whose_gradient_is_no_number(value):
    pairs = pair()
    train(pairs, range(10))
    for module, optimizer in pairs:
        optimizer.zero_grad()
        rows = module(torch.tensor([0, 2]))
        (rows.sin().sum() + (rows[1, 1] * value)).backward()
        optimizer.step()
    train(pairs, range(10, 40))
    (module, _), (twin, _) = pairs
    found, expected = module.state_dict()["weight"], twin.weight.detach()
    assert expected.isnan().sum() > 0
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)


# Betas that change at every step


def test_betas_that_cycle_are_right_and_said_once(caplog):
    pairs = pair()
    with caplog.at_level(logging.WARNING, logger="finetune"):
        for number in range(30):
            for _, optimizer in pairs:
                optimizer.param_groups[0]["betas"] = (0.85 + 0.1 * (number % 3) / 3, 0.999)
            train(pairs, [number])
    assert difference(pairs) <= 1e-10
    assert len(caplog.records) == 1
    assert "cycle_momentum=False" in caplog.text
