"""adamw and adam take the lazy path by themselves if it gives the same result, and say so."""

import itertools

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim import adapt_state, build_with_lazy_path, why_no_lazy_path


class Model(nn.Module):
    def __init__(self, tied=False, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.table.weight.requires_grad_(not frozen)

    def get_input_embeddings(self):
        return self.table

    def forward(self, ids):
        return self.head(self.table(ids))


def train(model, optimizer, steps):
    for step in steps:
        ids = torch.tensor([step % 3, 3 + step % 5, 20 if step == 2 else 1])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), (ids + 1) % 30).backward()
        optimizer.step()


CASES = [  # name, lazy, model, options, class, words of the line
    ("adamw", "auto", {}, {}, "LazyAdamW", "computes only the rows in use of 'table'"),
    ("adamw", True, {}, {"betas": (0.9, 0.95)}, "LazyAdamW", "only the rows in use"),
    ("adam", "auto", {}, {}, "LazyAdamW", "adam computes only the rows"),
    ("adamw", False, {}, {}, "AdamW", "optimizer.lazy is false"),
    ("adam", False, {}, {}, "Adam", "optimizer.lazy is false"),
    ("adamw", "auto", {"tied": True}, {}, "AdamW", "shares its weight with 'head'"),
    ("adamw", "auto", {"frozen": True}, {}, "AdamW", "is frozen"),
    ("adamw", "auto", {}, {"betas": (0.9, 0.9)}, "AdamW", "leave no exact lazy path"),
    ("adamw", "auto", {}, {"eps": 0.0}, "AdamW", "leave no exact lazy path"),
    ("adamw", "auto", {}, {"amsgrad": True}, "AdamW", "amsgrad asks for torch's own adamw"),
    ("adamw", "auto", {}, {"fused": True}, "AdamW", "fused asks for torch's own adamw"),
    ("adam", "auto", {}, {"weight_decay": 0.1}, "Adam", "weight decay is a part of the gradient"),
    ("lazy_adamw", "auto", {}, {}, "LazyAdamW", ""),
    ("lion", "auto", {}, {}, "Lion", ""),
]
REFUSED = [
    ("adamw", True, {"tied": True}, {}, "optimizer.lazy is true, but .* shares its weight"),
    ("adamw", True, {}, {"betas": (0.9, 0.9)}, "optimizer.lazy is true, but betas"),
    ("adam", True, {}, {"weight_decay": 0.1}, "optimizer.lazy is true, but adam's"),
    ("lion", True, {}, {}, "only adamw and adam have"),
    ("lazy_adamw", False, {}, {}, "Name adamw to step"),
]


@pytest.mark.parametrize(("name", "lazy", "model", "options", "kind", "words"), CASES)
def test_the_path_and_the_line(name, lazy, model, options, kind, words):
    optimizer, line = build_with_lazy_path(Model(**model), name, lazy, **options)
    assert type(optimizer).__name__ == kind
    assert optimizer.param_groups[0]["optimizer"] == name
    assert words in line
    assert bool(words) == bool(line)
    assert "\n" not in line


@pytest.mark.parametrize(("name", "lazy", "model", "options", "words"), REFUSED)
def test_a_path_that_there_is_not_is_refused(name, lazy, model, options, words):
    with pytest.raises(UserError, match=words):
        build_with_lazy_path(Model(**model), name, lazy, **options)


@pytest.mark.parametrize(
    "options", [{"betas": 0.9}, {"betas": ["x", 1]}, {"betas": [0.9, 1.0]}, {"eps": "small"}]
)
def test_options_that_are_no_numbers_are_left_to_those_who_refuse_them(options):
    assert "no exact lazy path" in str(why_no_lazy_path("adamw", options, "auto"))
    with pytest.raises(UserError, match=r"betas|eps"):
        build_with_lazy_path(Model(), "adamw", "auto", **options)


def test_a_sharded_table_stays_dense_unless_lazy_is_true():
    assert "shards" in str(why_no_lazy_path("adamw", {}, "auto", sharded=True))
    assert why_no_lazy_path("adamw", {}, True, sharded=True) is None


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_both_paths_give_the_same_numbers(name):
    models = [Model(), Model()]
    for model, lazy in zip(models, ("auto", False)):
        train(model, build_with_lazy_path(model, name, lazy, lr=0.01)[0], range(40))
    for ours, theirs in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        torch.testing.assert_close(ours + 0, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam"])
@pytest.mark.parametrize("paths", list(itertools.product(("auto", False), repeat=3)))
def test_a_checkpoint_of_either_goes_on_in_the_other(name, paths):
    """Rows that lag when it is taken are brought up to date, or go on to lag."""
    model, oracle = Model(), Model()
    train(oracle, build_with_lazy_path(oracle, name, False, lr=0.01)[0], range(30))
    saved = None
    for i, lazy in enumerate(paths):
        model = Model()
        optimizer, _ = build_with_lazy_path(model, name, lazy, lr=0.01)
        with optimizer.deferred() if lazy else torch.no_grad():
            if saved:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(adapt_state(optimizer, saved[1]))
        train(model, optimizer, range(10 * i, 10 * i + 10))
        with optimizer.deferred() if lazy else torch.no_grad():
            saved = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    for ours, theirs in zip(model.state_dict().values(), oracle.state_dict().values()):
        torch.testing.assert_close(ours + 0, theirs, rtol=0, atol=1e-6)


def test_lazy_adamw_and_adamw_are_one_rule():
    """Either loads the state of the other, and goes on from its rate."""
    lazy, _ = build_with_lazy_path(Model(), "lazy_adamw", "auto")
    dense, _ = build_with_lazy_path(Model(), "adamw", False)
    for source, target, lr in ((lazy, dense, 0.25), (dense, lazy, 0.5)):
        for group in source.param_groups:
            group["lr"] = lr
        target.load_state_dict(adapt_state(target, source.state_dict()))
        assert {group["lr"] for group in target.param_groups} == {lr}


def test_rows_that_lag_are_not_loaded_into_a_dense_optimizer():
    model = Model()
    lazy, _ = build_with_lazy_path(model, "adamw", "auto")
    train(model, lazy, range(3))
    dense, _ = build_with_lazy_path(Model(), "adamw", False)
    with pytest.raises(UserError, match="adapt_state"):
        dense.load_state_dict(lazy.state_dict())


def test_the_state_of_another_rule_is_refused():
    adam, _ = build_with_lazy_path(Model(), "adam", "auto")
    adamw, _ = build_with_lazy_path(Model(), "adamw", "auto")
    with pytest.raises(UserError, match="state is of adamw, but this run uses adam"):
        adam.load_state_dict(adapt_state(adam, adamw.state_dict()))


def test_a_lazily_stepped_state_gets_the_kernel_of_the_dense_optimizer():
    """torch reads from the loaded groups where a kernel wants its step counts."""
    model = Model()
    source, _ = build_with_lazy_path(model, "adamw", "auto")
    train(model, source, range(3))
    target, _ = build_with_lazy_path(model, "adamw", False, fused=True)
    state = source.state_dict()
    adapted = adapt_state(target, state)
    assert [group["fused"] for group in adapted["param_groups"]] == [True] * len(
        target.param_groups
    )
    assert not any("fused" in group for group in state["param_groups"])  # the caller's own
