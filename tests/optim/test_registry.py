"""Names, aliases, options and the table."""

import inspect
from fractions import Fraction

import numpy as np
import pytest
import torch

from finetune.errors import UserError
from finetune.optim import (
    build_optimizer,
    check_optimizer,
    list_optimizers,
    optimizer_info,
    optimizer_table,
    register_optimizer,
    registry,
)
from finetune.optim.signature import read_signature


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("AdamW", "adamw"),
        ("ADAMW", "adamw"),
        ("adam-w", "adamw"),
        ("Adam W", "adamw"),
        ("adamw_torch", "adamw"),
        ("adamw_torch_fused", "adamw"),
        ("adamw_hf", "adamw"),
        ("AdamW_8bit", "adamw_8bit"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("bnbadamw8bit", "adamw_8bit"),
        ("RMSProp", "rmsprop"),
        ("SparseAdam", "sparse_adam"),
        ("LazyAdamW", "lazy_adamw"),
        ("lion_32bit", "lion"),
        ("ScheduleFreeAdamW", "schedule_free_adamw"),
        ("SGD", "sgd"),
    ],
)
def test_spellings_that_mean_the_same_rule(spelling, name):
    assert optimizer_info(spelling).name == name


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(
        UserError,
        match=r"no optimizer 'adagard'; the optimizers are sgd, mom.*\. Did you mean 'adagrad'\?$",
    ):
        optimizer_info("adagard")
    with pytest.raises(
        UserError, match="there is no optimizer 'foo_adam'"
    ):  # a prefix is not ignored
        build_optimizer([torch.nn.Parameter(torch.ones(2))], "foo_adam")


def test_patterns_list_names_in_any_case():
    assert list_optimizers("*ADAM") == ["adam", "sparse_adam"]
    assert list_optimizers("nothing*") == []
    assert len(list_optimizers()) == 14


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("sgd", {"momentum": 0.0, "nesterov": False}),
        ("momentum", {"momentum": 0.9, "nesterov": False}),
        ("nesterov", {"momentum": 0.9, "nesterov": True}),
        ("rmsprop", {"momentum": 0, "centered": False}),
        (
            "adam",
            {
                "betas": (0.9, 0.999),
                "decoupled_weight_decay": False,
                "weight_decay": 0,
                "amsgrad": False,
            },
        ),
        (
            "adamw",
            {
                "betas": (0.9, 0.999),
                "decoupled_weight_decay": True,
                "weight_decay": 0.01,
                "amsgrad": False,
            },
        ),
    ],
)
def test_a_plain_name_is_the_rule_of_its_paper(name, rule):
    (group,) = build_optimizer([torch.nn.Parameter(torch.ones(2))], name).param_groups
    assert {key: group[key] for key in rule} == rule


def test_options_come_from_the_signature_with_the_defaults_of_the_name():
    assert optimizer_info("momentum").options["momentum"] == 0.9
    assert "nesterov" not in optimizer_info("momentum").options
    assert "momentum" not in optimizer_info("sgd").options
    signature = inspect.signature(torch.optim.AdamW)
    assert optimizer_info("adamw").options == {
        n: p.default for n, p in signature.parameters.items() if n != "params"
    }


NUMBERS = [np.float32(0.25), np.float64(0.25), np.float16(0.25), Fraction(1, 4)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
@pytest.mark.parametrize("name", ["adamw", "lazy_adamw", "sgd", "muon", "lion"])
def test_every_real_number_is_a_number_and_becomes_pythons_own(name, number, tmp_path):
    """NumPy's scalars in a state are what torch.load refuses."""
    layer = torch.nn.Linear(2, 2)
    beta = {"betas": [number, 0.5]} if name != "sgd" else {}
    settings = {"lr": number, "weight_decay": number, **beta}
    overrides = [{"pattern": "weight", "lr": number}]
    check_optimizer(name, {**settings, "overrides": overrides})
    optimizer = build_optimizer(layer, name, **settings, overrides=overrides, no_decay=())
    groups = [{"params": [layer.weight], "lr": number}]
    for made in (optimizer, build_optimizer(groups, name)):
        for group in made.param_groups:
            assert (type(group["lr"]), group["lr"]) == (float, 0.25)
        torch.save(made.state_dict(), tmp_path / "state.pt")
        made.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("wrong", [True, "1", None, np.float32("nan"), np.bool_(True)], ids=repr)
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(UserError, match=r"lr is .*\. Give a (finite )?number"):
        build_optimizer(torch.nn.Linear(2, 2), "adamw", lr=wrong)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "adamw",
            {"beta": (0.9, 0.95)},
            "optimizer 'adamw' does not take 'beta'; it takes lr, betas, eps, weight_decay, "
            "amsgrad, maximize, foreach, capturable, differentiable, fused, no_decay, overrides, "
            "layer_decay. "
            "Did you mean 'betas'?",
        ),
        (
            "sgd",
            {"momentum": 0.9},
            "optimizer 'sgd' does not take 'momentum'; it takes lr, weight_decay",
        ),
        (
            "sparse_adam",
            {"weight_decay": 0.1},
            "optimizer 'sparse_adam' does not take 'weight_decay'; it takes lr, betas",
        ),
        (
            "adamw",
            {"lr": -1.0},
            "optimizer 'adamw' cannot be built with {'lr': -1.0}: Invalid learning rate: -1.0",
        ),
        ("adamw", {"lr": "2e-5"}, "optimizer 'adamw': lr is '2e-5'. Give a number"),
        ("adamw", {"lr": float("nan")}, "optimizer 'adamw': lr is nan. Give a finite number"),
        (
            "lion",
            {"betas": (0.9, 1.0)},
            "optimizer 'lion' cannot be built with {'betas': (0.9, 1.0)}: betas are (0.9, 1.0)",
        ),
        (
            "muon",
            {"adjust_lr_fn": "x"},
            "optimizer 'muon' cannot be built with {'adjust_lr_fn': 'x'}",
        ),
        (
            "adamw",
            {"no_decay": ["norms"]},
            "no_decay names 'norms'; the kinds of parameter are embedding, norm, bias, weight. "
            "Did you mean 'norm'?",
        ),
        ("adamw", {"no_decay": "norm"}, "no_decay is the text 'norm'. Give a list"),
        ("adamw", {"layer_decay": 1.5}, "layer_decay is 1.5; it must lie above 0 and at most at 1"),
        ("adamw", {"overrides": [{"pattern": "*", "rl": 1.0}]}, "an override holds 'rl'"),
        (
            "adamw",
            {"overrides": [{"pattern": "*"}]},
            "the override {'pattern': '*'} needs a pattern and something to set",
        ),
        (
            "adamw",
            {"overrides": [{"pattern": "*", "lr": "1"}]},
            "the override {'pattern': '*', 'lr': '1'} sets lr to '1'",
        ),
        (
            "sparse_adam",
            {"overrides": [{"pattern": "*", "weight_decay": 1.0}]},
            "an override holds 'weight_decay'",
        ),
    ],
)
def test_wrong_options_are_found_before_there_is_a_model(name, options, sentence):
    with pytest.raises(UserError) as before:
        check_optimizer(name, options)
    assert str(before.value).startswith(sentence)
    with pytest.raises(UserError) as at_build:
        build_optimizer(torch.nn.Linear(2, 2), name, **options)
    assert str(at_build.value) == str(before.value)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("adamw", {"fused": True, "foreach": True}, "optimizer 'adamw' cannot be built with"),
        ("adamw", {"differentiable": True}, "optimizer 'adamw' cannot step with"),
        ("muon", {"ns_steps": 100}, "optimizer 'muon' cannot step with {'ns_steps': 100}"),
    ],
)
def test_options_that_torch_refuses_late_are_found_before_there_is_a_model(name, options, sentence):
    with pytest.raises(UserError) as refused:
        check_optimizer(name, options)
    assert str(refused.value).startswith(sentence)


def test_one_that_is_not_installed_says_how_to_install_it():
    info = registry.OptimizerInfo("absent", "no_such_library:Class", "", "", state_bytes=8)
    with pytest.raises(UserError, match="Run: pip install no_such_library"):
        registry.check_options(info, {"lr": 1e-3}, allowed=[])


def test_every_optimizer_steps_with_its_defaults():
    names = [name for name in list_optimizers() if not optimizer_info(name).missing]
    assert len(names) >= 10
    for name in names:
        check_optimizer(name, {})


def test_modules_are_an_option_of_build_optimizer_that_no_config_is_offered():
    info = optimizer_info("lazy_adamw")
    assert info.options.keys() - info.config_options.keys() == {"embeddings"}
    with pytest.raises(UserError, match="Leave it out: those of the model"):
        check_optimizer("lazy_adamw", {"embeddings": []})
    with pytest.raises(UserError, match="does not take 'embedings'") as in_config:
        check_optimizer("lazy_adamw", {"embedings": []})
    assert "embeddings" not in str(in_config.value)
    with pytest.raises(UserError, match="Did you mean 'embeddings'"):
        build_optimizer(torch.nn.Linear(2, 2), "lazy_adamw", embedings=[])


def test_good_options_pass_the_check():
    check_optimizer(
        "AdamW", {"lr": 1e-3, "betas": [0.9, 0.95], "no_decay": ("bias",), "layer_decay": 0.9}
    )
    check_optimizer("sparse_adam", {"weight_decay": 0.0})  # no decay is what it does


class Halving(torch.optim.Optimizer):
    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.data.mul_(1 - 0.5 * self.param_groups[0]["lr"])


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))
    monkeypatch.setattr(registry, "_BY_SPELLING", dict(registry._BY_SPELLING))
    return register_optimizer(
        "halving",
        Halving,
        what="halves",
        paper="https://example.org",
        state_bytes=0,
        aliases=("half_it",),
    )


def test_a_registered_optimizer_is_one_of_them(registered):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([("weight", parameter)], "Half-It", lr=1.0)
    optimizer.step()
    assert parameter.tolist() == [0.5, 0.5]
    assert optimizer_info("halving") is registered
    assert list_optimizers()[-1] == "halving"


@pytest.mark.parametrize("taken", ["halving", "HALVING", "half-it", "adam-w"])
def test_a_name_is_registered_once(registered, taken):
    before = list_optimizers()
    with pytest.raises(UserError, match=f"the optimizer name '{taken}' is taken by"):
        register_optimizer(taken, Halving, what="", paper="", state_bytes=0)
    with pytest.raises(UserError, match="is taken by"):
        register_optimizer("new", Halving, what="", paper="", state_bytes=0, aliases=(taken,))
    assert list_optimizers() == before


def test_the_table_has_a_line_for_each_and_no_empty_cell():
    table = optimizer_table()
    assert [line["name"] for line in table] == list_optimizers()
    assert all(list(line) == list(table[0]) for line in table)
    assert all(cell for line in table for cell in line.values())
    assert optimizer_table("adamw")[0] == {
        "name": "adamw",
        "what": "Adam with decoupled weight decay",
        "sparse gradients": "none",
        "state bytes per parameter": "8",
        "available": "yes",
        "paper": "https://arxiv.org/abs/1711.05101",
    }


def test_options_read_from_the_source_are_those_of_the_class():
    """What is refused before torch is imported is what the class itself refuses."""
    there = [info for name in list_optimizers() if not (info := optimizer_info(name)).missing]
    assert len(there) >= 12
    for info in there:
        parameters = list(inspect.signature(info.load()).parameters)[1:]
        assert read_signature(info.origin) == tuple(parameters), info.name
