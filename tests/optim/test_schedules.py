"""Schedules against values worked out by hand."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import UserError
from finetune.optim import SCHEDULES, build_lr_scheduler
from finetune.optim.schedules import multiplier

BY_HAND = {
    # 10 steps, 2 of them warm-up, floor 0.2
    ("constant", 0.2): [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ("linear", 0.2): [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
    ("linear", 0.0): [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    ("cosine", 0.0): [0.5, 1, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060],
    ("inverse_sqrt", 0.5): [
        0.5,
        1,
        0.816497,
        0.707107,
        0.632456,
        0.577350,
        0.534522,
        0.5,
        0.5,
        0.5,
    ],
}


@pytest.mark.parametrize(("name", "floor"), BY_HAND)
def test_values_by_hand(name, floor):
    got = [
        multiplier(step, name=name, num_steps=10, warmup_steps=2, min_lr_ratio=floor)
        for step in range(10)
    ]
    assert got == pytest.approx(BY_HAND[name, floor], abs=1e-6)


def test_every_schedule_has_a_case_by_hand():
    assert {name for name, _ in BY_HAND} == set(SCHEDULES)


@given(
    name=st.sampled_from(SCHEDULES),
    num_steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_no_step_has_lr_zero_and_the_floor_holds(name, num_steps, warmup, floor):
    warmup_steps = int(warmup * num_steps)
    factors = [
        multiplier(s, name=name, num_steps=num_steps, warmup_steps=warmup_steps, min_lr_ratio=floor)
        for s in range(num_steps)
    ]
    assert all(0 < factor <= 1 for factor in factors)
    assert all(factor >= floor - 1e-12 for factor in factors[warmup_steps:])
    rising, falling = factors[:warmup_steps], factors[warmup_steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if name in ("linear", "cosine"):  # one step after the last, and ever after
        for step in (num_steps, num_steps + 7):
            after = multiplier(
                step, name=name, num_steps=num_steps, warmup_steps=warmup_steps, min_lr_ratio=floor
            )
            assert math.isclose(after, floor, abs_tol=1e-12)


def test_the_scheduler_multiplies_each_groups_lr_and_resumes():
    first, second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))

    def make():
        optimizer = torch.optim.SGD(
            [{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.5}]
        )
        return optimizer, build_lr_scheduler(
            optimizer, "linear", num_steps=10, warmup_steps=2, min_lr_ratio=0.2
        )

    def advance(optimizer, scheduler, steps):
        seen = []
        for _ in range(steps):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return seen

    optimizer, scheduler = make()
    seen = advance(optimizer, scheduler, 4)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    seen += advance(optimizer, scheduler, 6)
    expected = BY_HAND["linear", 0.2]
    assert [lr for lr, _ in seen] == pytest.approx(expected)
    assert [lr for _, lr in seen] == pytest.approx([factor / 2 for factor in expected])
    resumed, resumed_scheduler = make()
    resumed.load_state_dict(saved[0])
    resumed_scheduler.load_state_dict(saved[1])
    assert advance(resumed, resumed_scheduler, 6) == seen[4:]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"name": "cosinus"},
            "there is no schedule 'cosinus'; the schedules are constant, linear, cosine, "
            "inverse_sqrt. Did you mean 'cosine'?",
        ),
        ({"num_steps": 0, "warmup_steps": 0}, "num_steps is 0; a schedule needs at least one step"),
        ({"warmup_steps": 11}, "warmup_steps is 11; it must lie between 0 and the run's 10 steps"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio is 1.5; it must lie between 0 and 1"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(change, sentence):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    arguments = {
        "name": "linear",
        "num_steps": 10,
        "warmup_steps": 2,
        "min_lr_ratio": 0.0,
        **change,
    }
    with pytest.raises(UserError) as caught:
        build_lr_scheduler(optimizer, arguments.pop("name"), **arguments)
    assert str(caught.value).startswith(sentence)
