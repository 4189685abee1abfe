"""What counts as divergence: a lasting rise of the loss, and not the noise of small steps."""

import math
from collections.abc import Callable, Iterator
from random import Random

import pytest

from finetune.training.stopping import DivergenceGuard

Step = tuple[float, int]  # nats per target token, target tokens


def yes_or_a_sentence(random: Random) -> Step:
    return (0.2, 2) if random.random() < 0.5 else (random.gauss(6, 1), random.randint(20, 60))


def answers_of_any_length(random: Random) -> Step:
    targets = int(random.lognormvariate(3, 1)) + 1
    return max(0.0, random.gauss(5, 4 / targets**0.3)), targets


def a_rare_long_one_of_noise(random: Random) -> Step:
    return (7.0, 800) if random.random() < 0.02 else (abs(random.gauss(1, 0.8)), 8)


def full_steps(random: Random) -> Step:
    return random.gauss(3, 0.3), 4000


@pytest.mark.parametrize(
    "kind", [yes_or_a_sentence, answers_of_any_length, a_rare_long_one_of_noise, full_steps]
)
def test_noise_stops_no_run_and_a_rise_does(kind: Callable[[Random], Step]) -> None:
    for seed in range(50):
        random, guard = Random(seed), DivergenceGuard(threshold=4.0)
        steps = [kind(random) for _ in range(600)]
        assert [guard.problem(loss, 1.0, targets) for loss, targets in steps] == [None] * 600
        rise = (guard.problem(loss + 9, 1.0, targets) for loss, targets in _endless(kind, random))
        assert any(
            problem and "the loss rose to" in problem for _, problem in zip(range(400), rise)
        )


def _endless(kind: Callable[[Random], Step], random: Random) -> Iterator[Step]:
    while True:
        yield kind(random)


def test_a_rise_at_the_start_is_found_at_the_tenth_step() -> None:
    guard = DivergenceGuard(threshold=4.0)
    losses = [3.0, 3.1, 3.0, 6.0, *[12.0] * 20]
    found = [guard.problem(loss, 1.0, 1000) is not None for loss in losses]
    assert found.index(True) == 9


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (3e3, 1.0)]
)
def test_what_is_not_a_number_or_absurd_stops_at_once(loss: float, norm: float) -> None:
    assert DivergenceGuard(threshold=4.0).problem(loss, norm, 1) is not None
