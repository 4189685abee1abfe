"""Learning-rate grids: where they lie, how they are widened."""

import math

import pytest

from finetune.comparison.grids import ADAMW_LR, TIMES_ADAMW, centre, lr_grid, wider
from finetune.optim import list_optimizers


def test_half_decades_around_the_middle():
    assert lr_grid(1e-3, 5) == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert lr_grid(2e-5, 3) == [6e-6, 2e-5, 6e-5]
    assert lr_grid(1e-3, 4) == [1e-4, 3e-4, 1e-3, 3e-3]
    assert lr_grid(0.3, 1) == [0.3]
    assert lr_grid(900.0, 3, highest=1000.0) == [90.0, 270.0, 900.0]
    assert len(lr_grid(900.0, 15, highest=1000.0)) == 15


def test_every_optimizer_of_the_catalogue_has_a_centre():
    assert set(list_optimizers()) == set(TIMES_ADAMW)
    assert len(TIMES_ADAMW) >= 14
    assert centre("adamw", "pretrained") == ADAMW_LR["pretrained"] < ADAMW_LR["random"]
    assert centre("sgd", "random") == pytest.approx(0.9)


def test_a_grid_is_widened_only_where_its_best_lies_at_an_end():
    assert wider({1e-4: 3.0, 1e-3: 2.0, 1e-2: 2.5}) is None
    assert wider({1e-4: 3.0, 3e-4: 2.5, 1e-3: 2.0}) == 3e-3
    assert wider({1e-4: 3.0, 3e-4: 2.5, 1e-3: 2.0, 3e-3: 1.0}) == 1e-2
    assert wider({1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}) == 3e-4
    assert wider({1e-3: 1.0, 3e-3: 2.0}) is None


def test_where_everything_diverged_the_search_goes_on_below():
    assert wider({1.0: math.inf, 3.0: math.inf, 10.0: math.inf}) == 0.3
