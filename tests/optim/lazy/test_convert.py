"""A run that changes optimizer goes on along the same trajectory."""

import copy

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim import LazyAdamW, from_adamw_state, to_adamw_state


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.embed = (
            nn.Linear(4, 2, dtype=torch.float64),
            nn.Embedding(30, 4, dtype=torch.float64),
        )

    def forward(self, ids):
        return self.head(self.embed(ids).sin()).square().sum()


def groups(model):
    return [
        {"params": model.head.parameters(), "lr": 0.02},
        {"params": model.embed.parameters(), "weight_decay": 0.2},
    ]


def dense(model):
    return torch.optim.AdamW(groups(model), lr=0.01, betas=(0.8, 0.99), foreach=False)


def lazy(model):
    return LazyAdamW(groups(model), lr=0.01, betas=(0.8, 0.99), embeddings=[model.embed])


def run(model, optimizer, steps):
    for step in steps:
        optimizer.param_groups[1]["lr"] = 0.01 / (1 + step)
        optimizer.zero_grad()
        model(torch.randint(30, (4,), generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()


@pytest.fixture
def models():
    torch.manual_seed(0)
    model = Model()
    reference = copy.deepcopy(model)
    run(reference, dense(reference), range(40))
    return model, reference


def assert_close(model, reference):
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-9)


def test_from_adamw_and_back(models):
    model, reference = models
    first = dense(model)
    run(model, first, range(10))
    second = lazy(model)
    from_adamw_state(second, first.state_dict())
    touched = torch.cat(
        [
            torch.randint(30, (4,), generator=torch.Generator().manual_seed(step))
            for step in range(10)
        ]
    ).unique()
    assert second.state_dict()["state"][2]["rows"].tolist() == touched.tolist()
    run(model, second, range(10, 25))
    third = dense(model)
    third.load_state_dict(to_adamw_state(second))
    second.release()
    run(model, third, range(25, 40))
    assert_close(model, reference)


def test_the_state_of_another_optimizer_is_refused(models):
    model, _ = models
    other = torch.optim.AdamW(groups(model), lr=0.01, amsgrad=True)
    run(model, other, range(2))
    second = lazy(model)
    with pytest.raises(UserError, match="amsgrad"):
        from_adamw_state(second, other.state_dict())
    with pytest.raises(UserError, match=r"use finetune\.optim\.from_adamw_state"):
        second.load_state_dict(other.state_dict())


def test_before_the_first_step(models):
    model, reference = models
    first, second = dense(model), lazy(model)
    from_adamw_state(second, first.state_dict())
    first.load_state_dict(to_adamw_state(second))
    run(model, second, range(40))
    assert_close(model, reference)


def test_a_state_of_other_groups_is_refused(models):
    model, _ = models
    other = torch.optim.AdamW(model.parameters())
    run_one = model(torch.arange(4))
    run_one.backward()
    other.step()
    with pytest.raises(UserError, match=r"groups of 3 parameters, but this run has 2 \+ 1"):
        from_adamw_state(lazy(model), other.state_dict())


def test_the_state_of_adam_with_weight_decay_is_refused(models):
    """Its decay is a part of the gradient."""
    for decay in (0.1, 0.0):
        model = Model()
        other = torch.optim.Adam(
            [{**group, "weight_decay": decay} for group in groups(model)], lr=0.01, foreach=False
        )
        model.embed(torch.arange(4)).sum().backward()
        other.step()
        other.zero_grad()
        if decay:
            with pytest.raises(UserError, match=r"weight_decay=0\.1"):
                from_adamw_state(lazy(model), other.state_dict())
        else:
            from_adamw_state(lazy(model), other.state_dict())


def test_a_state_is_converted_while_a_dense_gradient_is_there(models):
    model, _ = models
    first = lazy(model)
    run(model, first, range(3))
    model.embed.weight.square().sum().backward()
    assert to_adamw_state(first)["state"][2]["exp_avg"].shape == (30, 4)
    first.release()
    assert type(model.embed) is nn.Embedding
