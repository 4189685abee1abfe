"""What PyTorch's own optimizer suite checks, re-created for every optimizer of the factory.

`test_contracts.py` has the rest of it: the falling loss, resumes, copies, groups, layouts, dtypes,
tensor learning rates, closures. Each check here is a function of a model and its optimizer.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from finetune.errors import UserError
from finetune.optim import build_optimizer, clip_grad_norm_
from tests.optim.test_contracts import (
    LR,
    assert_same,
    every_optimizer,
    loss_of,
    make,
    train,
    values,
)

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@check
def its_repr_names_its_options(name):
    _, optimizer = make(name)
    assert "lr: " in repr(optimizer)
    assert type(optimizer).__name__ in repr(optimizer)


@check
def a_step_without_any_gradient_does_nothing(name):
    model, optimizer = make(name)
    before = values(model, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(values(model, optimizer), before, rtol=0, atol=0)


@check
def a_step_without_gradients_in_mid_run_does_nothing(name):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    before = values(model, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(values(model, optimizer), before, rtol=0, atol=0)


@check
def the_first_step_goes_downhill(name):
    model, optimizer = make(name, weight_decay=0.0)
    before = values(model, optimizer)
    loss_of(model, 0).backward()
    gradients = {n: p.grad.to_dense().clone() for n, p in model.named_parameters()}
    optimizer.step()
    after = values(model, optimizer)
    along = sum(float(((after[n] - before[n]) * gradients[n]).sum()) for n in before)
    assert along < 0


@check
def gradients_are_not_written(name):
    if name == "schedule_free_adamw":
        pytest.skip("schedulefree writes into the gradients")
    model, optimizer = make(name)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    before = [p.grad.to_dense().clone() for p in model.parameters()]
    optimizer.step()
    for p, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad.to_dense(), grad)


@check
def zero_grad_to_none_and_to_zero_are_one(name):
    (first, one), (second, two) = make(name), make(name)
    train(first, one, range(4))
    for step in range(4):
        two.zero_grad(set_to_none=step % 2 == 0)
        loss_of(second, step).backward()
        two.step()
    assert_same(values(first, one), values(second, two), rtol=0, atol=1e-6)


@check
def the_state_dict_is_the_same_when_asked_twice(name):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    first, second = optimizer.state_dict(), optimizer.state_dict()
    assert first.keys() == second.keys()
    for index, entry in first["state"].items():
        for key, value in entry.items():
            other = second["state"][index][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@check
def a_state_dict_survives_weights_only(name):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, its_optimizer = make(name)
    other.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    train(model, optimizer, range(3, 6))
    train(other, its_optimizer, range(3, 6))
    assert_same(values(model, optimizer), values(other, its_optimizer), rtol=1e-4, atol=2e-6)


@check
def a_state_loads_before_its_weights(name):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, its_optimizer = make(name)
    its_optimizer.load_state_dict(state)
    other.load_state_dict(weights)
    train(model, optimizer, range(3, 6))
    train(other, its_optimizer, range(3, 6))
    assert_same(values(model, optimizer), values(other, its_optimizer), rtol=1e-4, atol=2e-6)


@check
def a_state_loads_into_a_running_one(name):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    expected = values(model, optimizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(3, 6))
    assert_same(values(model, optimizer), expected, rtol=1e-4, atol=2e-6)


@check
def an_empty_state_starts_anew(name):
    model, optimizer = make(name)
    empty = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3))
    expected = values(model, optimizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(empty)
    train(model, optimizer, range(3))
    assert_same(values(model, optimizer), expected, rtol=0, atol=1e-6)


@check
def a_state_of_other_sizes_is_refused(name):
    _, optimizer = make(name)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["params"].append(999)
    with pytest.raises((UserError, ValueError)):
        optimizer.load_state_dict(state)


@check
def a_pair_pickles(name):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    other, its_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, range(3, 6))
    train(other, its_optimizer, range(3, 6))
    assert_same(values(model, optimizer), values(other, its_optimizer), rtol=0, atol=0)


@check
def step_hooks_run_once_in_order_and_go(name):
    model, optimizer = make(name)
    calls = []
    before = optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    after = optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, range(1))
    assert calls == ["pre", "post"]
    before.remove(), after.remove()
    train(model, optimizer, range(1))
    assert calls == ["pre", "post"]


@check
def state_dict_hooks_see_and_decide_what_is_saved(name):
    model, optimizer = make(name)
    train(model, optimizer, range(2))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda optimizer: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: calls.append(sizes(state)))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    state = optimizer.state_dict()
    assert calls == ["pre", sizes(state)]
    assert state["mine"] == 1


@check
def load_hooks_see_and_decide_what_is_loaded(name):
    model, optimizer = make(name)
    empty = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3))
    expected, state = values(model, optimizer), copy.deepcopy(optimizer.state_dict())
    calls = []

    def replace(optimizer, given):
        calls.append(sizes(given))
        return empty

    before = optimizer.register_load_state_dict_pre_hook(replace)
    after = optimizer.register_load_state_dict_post_hook(lambda optimizer: calls.append("post"))
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert calls == [sizes(state), "post"]
    before.remove(), after.remove()
    train(model, optimizer, range(3))
    assert_same(values(model, optimizer), expected, rtol=0, atol=1e-6)


@check
def a_group_is_added_with_and_without_names(name):
    model, optimizer = make(name)
    train(model, optimizer, range(2))
    for given in ("one", "list", "generator", "named"):
        extra = nn.Parameter(torch.ones(4, 4))
        group = {
            "one": extra,
            "list": [extra],
            "generator": (p for p in [extra]),
            "named": [("mine", extra)],
        }[given]
        optimizer.add_param_group({"params": group, "lr": 0.25})
        assert optimizer.param_groups[-1]["lr"] == 0.25
        assert optimizer.param_groups[-1]["optimizer"] == name
        gradient = torch.ones(4, 4)
        extra.grad = gradient.to_sparse(1) if name == "sparse_adam" else gradient
        for p in model.parameters():
            p.grad = None
        optimizer.step()
        getattr(optimizer, "eval", lambda: None)()
        getattr(optimizer, "train", lambda: None)()
        assert float(extra.detach().mean()) < 1
        extra.grad = None
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)


@check
def a_parameter_is_not_added_twice(name):
    model, optimizer = make(name)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [next(model.parameters())]})
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": {nn.Parameter(torch.ones(2, 2))}})


@check
def lr_is_changed_in_mid_run(name):
    model, optimizer = make(name)
    train(model, optimizer, range(2))
    before = values(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if name == "schedule_free_adamw":
        pytest.skip("schedulefree averages by lr, and divides by their sum")
    train(model, optimizer, range(2, 3))
    assert_same(values(model, optimizer), before, rtol=0, atol=0)


@check
def clipping_is_torchs(name):
    models = [make(name) for _ in range(2)]
    norms = []
    for (model, _), clip in zip(models, (clip_grad_norm_, nn.utils.clip_grad_norm_)):
        loss_of(model, 0).backward()
        if clip is nn.utils.clip_grad_norm_:
            for p in model.parameters():
                p.grad = p.grad.to_dense()
        norms.append(clip(model.parameters(), 0.01))
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-5)
    for ours, theirs in zip(models[0][0].parameters(), models[1][0].parameters()):
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad)


@check
def an_average_is_the_average_of_state_dicts(name):
    model, optimizer = make(name)
    train(model, optimizer, range(2))
    average, seen = AveragedModel(model), []
    for step in range(2, 6):
        train(model, optimizer, [step])
        average.update_parameters(model)
        seen.append({n: v.detach().clone() for n, v in model.state_dict().items()})
    found = average.module.state_dict()
    for key, value in found.items():
        expected = torch.stack([state[key] for state in seen]).mean(0)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@check
def an_infinite_step_of_a_scaler_is_none(name):
    pairs = [make(name), make(name)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    train(*pairs[1], [0, 2])
    model, optimizer = pairs[0]
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss * float("inf") if step == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(values(*pairs[0]), values(*pairs[1]), rtol=1e-4, atol=2e-6)


@check
def nothing_is_built_of_nothing(name):
    with pytest.raises((ValueError, UserError)):
        build_optimizer([], name)


@check
def a_negative_lr_and_an_unknown_option_are_refused(name):
    for options in ({"lr": -1.0}, {"nothing_of_the_kind": 1}, {"lr": "fast"}):
        with pytest.raises(UserError):
            make(name, **options)


@check
def every_parameter_counts_its_steps(name):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    counts = {
        int(s["step"]) for s in optimizer.state.values() if isinstance(s, dict) and "step" in s
    }
    assert counts <= {3}


def sizes(state):
    """Return the shapes of all tensors of a state dict."""
    return {
        (index, key): tuple(value.shape)
        for index, entry in state["state"].items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }


@every_optimizer
@pytest.mark.parametrize("what", CHECKS)
def test_as_in_torchs_suite(what, name):
    CHECKS[what](name)


def test_the_bank_is_whole():
    """Together with the checks of `test_contracts.py`."""
    assert len(CHECKS) >= 25
    assert set(LR) <= {p.values[0] for p in every_optimizer.args[1]}
