"""The functions against known values, the descents against steps by hand, the learning rates."""

import math

import pytest
import torch

from finetune.errors import UserError
from finetune.landscape import LANDSCAPES, descend, descend_by_default, descend_tuned, settles
from finetune.landscape.descents import CLOSE, LEARNING_RATES, check_descent
from finetune.optim import build_optimizer, list_optimizers, optimizer_info

DRAWABLE = [
    "sgd",
    "momentum",
    "nesterov",
    "adagrad",
    "rmsprop",
    "adam",
    "adamw",
    "adafactor",
    "lion",
]

# By hand: (x, y), value, gradient.
KNOWN = {
    "beale": [
        ((0, 0), 1.5**2 + 2.25**2 + 2.625**2, (-12.75, 0.0)),
        ((1, 1), 14.203125, (0.0, 27.75)),
    ],
    "rosenbrock": [((0, 0), 1.0, (-2.0, 0.0)), ((-1, 2), 104.0, (396.0, 200.0))],
    "rastrigin": [
        ((1, 0), 1.0, (2.0, 0.0)),
        ((0.5, 0), 20.25, (1.0, 0.0)),
        ((0.25, 0), 10.0625, (0.5 + 20 * math.pi, 0.0)),
    ],
    "valley": [((10, 1), 1.0, (0.1, 1.0))],
    "saddle": [((0, 0), 0.0, (0.0, 0.0)), ((2, 2), 4.0, (2.0, 6.0))],
}


def value_and_gradient(name: str, point: tuple[float, float]) -> tuple[float, list[float]]:
    position = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    value = LANDSCAPES[name].value(*position.unbind())
    value.backward()
    return value.item(), position.grad.tolist()


def test_every_landscape_is_known_here():
    assert KNOWN.keys() == LANDSCAPES.keys()
    assert len(LANDSCAPES) == 5


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in KNOWN.items() for case in cases]
)
def test_values_and_gradients(name, case):
    point, value, gradient = case
    assert value_and_gradient(name, point) == (
        pytest.approx(value, abs=1e-12),
        pytest.approx(gradient, abs=1e-12),
    )


@pytest.mark.parametrize("landscape", LANDSCAPES.values(), ids=list(LANDSCAPES))
def test_minima_are_flat_and_nothing_in_the_window_is_lower(landscape):
    left, right, bottom, top = landscape.window
    for minimum in landscape.minima:
        value, gradient = value_and_gradient(landscape.name, minimum)
        assert value == pytest.approx(landscape.lowest, abs=1e-12)
        assert gradient == pytest.approx([0, 0], abs=1e-12)
        assert left < minimum[0] < right
        assert bottom < minimum[1] < top
    x, y = torch.meshgrid(
        torch.linspace(left, right, 301), torch.linspace(bottom, top, 301), indexing="ij"
    )
    assert landscape.value(x.double(), y.double()).min() >= landscape.lowest - 1e-12
    assert left < landscape.start[0] < right
    assert bottom < landscape.start[1] < top


def test_gradient_descent_by_hand():
    """On the valley every step multiplies x by 1 - 0.01 lr and y by 1 - lr."""
    (descent,) = descend(LANDSCAPES["valley"], "sgd", [0.5], steps=4)
    x, y = LANDSCAPES["valley"].start
    torch.testing.assert_close(
        descent.points,
        torch.tensor([(x * 0.995**n, y * 0.5**n) for n in range(5)]).double(),
        rtol=1e-7,
        atol=0,
    )
    assert descent.height == pytest.approx((0.01 * (x * 0.995**4) ** 2 + (y * 0.5**4) ** 2) / 2)


@pytest.mark.parametrize("name", DRAWABLE)
def test_descents_that_share_an_optimizer_equal_one_stepped_alone(name):
    landscape = LANDSCAPES["beale"]
    position = torch.tensor(landscape.start, dtype=torch.float64, requires_grad=True)
    optimizer = build_optimizer([position], name, lr=1e-3)
    alone = [position.detach().clone()]
    for _ in range(20):
        x, y = position.detach().unbind()
        parts = [c - x + x * y**n for n, c in enumerate((1.5, 2.25, 2.625), start=1)]
        gradient = [
            sum(2 * part * (y**n - 1) for n, part in enumerate(parts, start=1)),
            sum(2 * part * n * x * y ** (n - 1) for n, part in enumerate(parts, start=1)),
        ]
        position.grad = torch.stack(gradient)
        optimizer.step()
        alone.append(position.detach().clone())
    descents = descend(landscape, name, [1e-4, 1e-3, 1e5], steps=20)
    torch.testing.assert_close(descents[1].points, torch.stack(alone), rtol=1e-9, atol=1e-12)
    assert descents[0].points.isfinite().all()


def test_which_optimizers_can_be_drawn():
    """Every one of the factory is either drawable or refused for a reason."""
    refused = {}
    for name in list_optimizers():
        try:
            check_descent(name)
        except UserError as error:
            refused[name] = str(error)
    assert [
        name
        for name in list_optimizers()
        if name not in refused and not optimizer_info(name).missing
    ][: len(DRAWABLE)] == DRAWABLE
    for name in ("sparse_adam", "lazy_adamw", "muon"):
        assert "made for a model's matrices" in refused[name]
    assert "is evaluated at another" in refused["schedule_free_adamw"]


def test_a_diverged_descent_ends_where_it_was_lost():
    (descent,) = descend(LANDSCAPES["rosenbrock"], "sgd", [1.0], steps=50)
    assert descent.diverged
    assert descent.height == math.inf
    assert descent.settled is None
    assert 1 <= len(descent.points) < 10
    assert descent.points.abs().max() <= 1e6


def test_settling():
    assert settles(torch.tensor([1.0, 0.5, 2 * CLOSE, CLOSE / 2, 0.0])) == 3
    assert settles(torch.tensor([1.0, 0.0, 1.0, 0.0])) == 3  # passing by is not arriving
    assert settles(torch.tensor([1.0, 0.0, 0.5])) is None


def test_the_default_is_the_factorys():
    for name in ("sgd", "adagrad"):
        assert (
            descend_by_default(LANDSCAPES["valley"], name, 1).lr
            == optimizer_info(name).options["lr"]
        )


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_tuning_takes_the_first_to_arrive_else_the_lowest(name):
    landscape = LANDSCAPES["valley"]
    assert len(LEARNING_RATES) == 19
    every = descend(landscape, name, LEARNING_RATES, 60)
    assert descend_tuned(landscape, name, 60).settled == min(
        (d.settled for d in every if d.settled is not None), default=None
    )
    few = descend_tuned(landscape, name, 2)
    assert few.settled is None
    assert few.height == min(d.height for d in descend(landscape, name, LEARNING_RATES, 2))


def test_a_low_last_point_is_no_low_end():
    """The height at the end is that of the last tenth, so a rate that bounces is not the best."""
    [bouncing] = descend(LANDSCAPES["valley"], "rmsprop", [2.0], 60)
    heights = LANDSCAPES["valley"].value(*bouncing.points.unbind(1)) - LANDSCAPES["valley"].lowest
    assert bouncing.height == pytest.approx(float(heights[-6:].mean()))
