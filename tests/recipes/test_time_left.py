"""How many steps `plan` says that a time has room for."""

import pytest

from finetune.recipes.plan.timing import TimeEstimate, steps_within


@pytest.mark.parametrize(
    ("limit", "every", "steps"),
    [
        (120, 100, 24),  # the first evaluation would come later, so none is counted
        (120, 24, 24),
        (130, 24, 24),  # 24 steps, and 10 s of an evaluation that takes 30 s
        (150 + 50, 24, 34),  # 24 steps, an evaluation, and 10 steps more
        (2 * 150 + 5, 24, 49),
        (1, 24, 1),
    ],
)
def test_evaluations_take_time_where_they_are(limit, every, steps):
    time = TimeEstimate(
        step=5.0,
        tokens_per_second=100,
        training=0,
        evaluation=10.0,
        generation=20.0,
        num_evaluations=2,
    )
    assert steps_within(limit, time, evaluate_every=every) == steps
