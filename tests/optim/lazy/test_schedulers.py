"""torch's schedulers drive a lazily stepped table as they drive dense AdamW."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from finetune.optim.lazy.adamw import LazyAdamW

STEPS = 40
SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [5, 20], 0.1),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, 9),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 12),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 30, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 15),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 6, 2),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda s: 1 / (1 + s)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda s: 0.97),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.05, STEPS + 1, cycle_momentum=False),
    "OneCycleLR that cycles betas": lambda o: schedulers.OneCycleLR(o, 0.05, STEPS + 1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 0.05, 6, cycle_momentum=False),
    "CyclicLR that cycles betas": lambda o: schedulers.CyclicLR(o, 1e-3, 0.05, 6),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 8), schedulers.ExponentialLR(o, 0.9)], [8]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 6), schedulers.ExponentialLR(o, 0.95)]
    ),
    "SWALR": lambda o: SWALR(o, 0.002, anneal_epochs=10),
}


def rows_and_rates(kind, name, as_lr=float):
    torch.manual_seed(0)
    module = nn.Embedding(20, 4, dtype=torch.float64)
    options = {"lr": as_lr(0.02), "weight_decay": 0.2}
    if kind == "lazy":
        optimizer = LazyAdamW(module.parameters(), embeddings=[module], **options)
    else:
        optimizer = torch.optim.AdamW(module.parameters(), foreach=False, **options)
    scheduler, rates = SCHEDULERS[name](optimizer), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = module(torch.tensor([0, 1 + step % 9, 12 if step < 3 else 0])).sin().sum()
        loss.backward()
        optimizer.step()
        scheduler.step(*([loss.detach()] if name == "ReduceLROnPlateau" else []))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return module.weight.detach() + 0, rates


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_torch(name):
    (ours, rates), (theirs, expected) = (rows_and_rates(kind, name) for kind in ("lazy", "dense"))
    assert rates == pytest.approx(expected, rel=1e-12)
    assert len({round(rate, 9) for rate in rates}) > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "StepLR"])
def test_a_rate_that_is_a_tensor(name):
    (ours, _), (theirs, _) = (rows_and_rates("lazy", name, t) for t in (torch.tensor, float))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # a float32 rate


def test_all_schedulers_of_torch_are_there():
    there = {name.split(" ")[0] for name in SCHEDULERS}
    classes = {name for name in schedulers.__all__ if name != "LRScheduler"}
    assert classes - there == set()
