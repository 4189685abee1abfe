"""torch's fused kernels, which ignore strides: each against the unfused one, in odd layouts."""

import logging

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim import build_optimizer, list_optimizers, optimizer_info

SHAPE = (6, 4, 3, 3)
FUSED = [name for name in list_optimizers() if "fused" in optimizer_info(name).options]


def transposed(values):
    """Return the same values, laid out with the last dimension first."""
    return values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def with_gaps(values):
    return torch.stack([values, values], -1)[..., 0]


def expanded(values):
    return values[:1, :1].expand(values.shape)


def channels_last(values):
    return values.to(memory_format=torch.channels_last)


GRADIENTS = {"transposed": transposed, "gaps": with_gaps, "expanded": expanded}
PARAMETERS = {"transposed": transposed, "gaps": with_gaps, "channels last": channels_last}
CASES = [
    *[(what, "gradient", how) for what, how in GRADIENTS.items()],
    *[(what, "parameter", how) for what, how in PARAMETERS.items()],
    *[(what, "state", how) for what, how in PARAMETERS.items()],
]


def build(name, param, fused):
    groups = [{"params": [param], "rule": "adamw"}] if name == "muon" else [param]
    return build_optimizer(groups, name, lr=0.01, weight_decay=0.1, fused=fused)


def step(optimizer, param, seed, lay=torch.clone, closure=False):
    def gradient():
        torch.manual_seed(seed)
        param.grad = lay(torch.randn(SHAPE))
        return 0.0

    if closure:
        param.grad = None
        optimizer.step(gradient)
    else:
        gradient()
        optimizer.step()


def run(name, where, how, *, fused, closure):
    """Take two steps as usual and three with one of the tensors laid out by `how`."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(SHAPE))
    optimizer = build(name, param, fused)
    for seed in range(2):
        step(optimizer, param, seed, closure=closure)
    assert optimizer.param_groups[0]["fused"] is fused
    if where == "parameter":
        param.data = how(param.data)
    if where == "state":
        state = optimizer.state_dict()
        state["state"] = {
            index: {key: how(v) if v.shape == SHAPE else v for key, v in entry.items()}
            for index, entry in state["state"].items()
        }
        optimizer.load_state_dict(state)
    for seed in range(2, 5):
        step(optimizer, param, seed, how if where == "gradient" else torch.clone, closure)
    return param.detach(), optimizer


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize(
    ("what", "where", "how"), CASES, ids=lambda part: part if isinstance(part, str) else ""
)
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_step_is_the_unfused_one_in_every_layout(name, what, where, how, closure):
    fused, optimizer = run(name, where, how, fused=True, closure=closure)
    unfused, _ = run(name, where, how, fused=False, closure=closure)
    torch.testing.assert_close(fused, unfused, rtol=0, atol=1e-6)
    has_none = where == "state" and name == "sgd"  # a state
    assert optimizer.param_groups[0]["fused"] is (True if has_none else None)


def test_the_table_sees_every_optimizer_with_a_fused_kernel():
    assert {"adamw", "adam", "muon", "sgd", "momentum", "nesterov", "adagrad"} == set(FUSED)


@pytest.mark.parametrize("lay", [torch.clone, channels_last])
def test_the_kernel_stays_where_all_are_laid_out_alike(lay, caplog):
    caplog.set_level(logging.INFO, "finetune")
    param = nn.Parameter(lay(torch.ones(SHAPE)))
    optimizer = build("adamw", param, fused=True)
    for seed in range(3):
        step(optimizer, param, seed, lay)
    assert optimizer.param_groups[0]["fused"] is True
    assert caplog.messages == []


def test_the_kernel_is_left_with_one_line_in_the_log(caplog):
    caplog.set_level(logging.INFO, "finetune")
    param = nn.Parameter(torch.ones(SHAPE))
    optimizer = build_optimizer([param], "adamw")
    for seed in range(3):
        step(optimizer, param, seed, transposed)
    (message,) = caplog.messages
    assert message.startswith("AdamW goes on without torch's fused kernel")


def test_a_group_of_matrices_under_muon_has_no_kernel_to_leave(caplog):
    caplog.set_level(logging.INFO, "finetune")
    matrix = nn.Parameter(torch.ones(4, 3))
    optimizer = build_optimizer([matrix], "muon")
    matrix.grad = torch.ones(3, 4).t()
    optimizer.step()
    assert caplog.messages == []


def test_under_a_grad_scaler_it_is_an_error():
    """The scaler leaves the scaling to a fused kernel, so an unfused step would not unscale."""
    param = nn.Parameter(torch.ones(SHAPE))
    optimizer, scaler = build_optimizer([param], "adamw"), torch.amp.GradScaler("cpu")
    param.grad = scaler.scale(torch.ones(SHAPE))
    scaler.step(optimizer)
    scaler.update()
    param.grad = transposed(param.grad)
    with pytest.raises(UserError, match=r"under a GradScaler.* Build it with fused=False"):
        scaler.step(optimizer)


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (1, 3), (3,), (2000, 3)], ids=str)
@pytest.mark.parametrize("name", [name for name in FUSED if name != "sgd"])  # it has no state
def test_a_state_of_another_shape_is_refused(name, shape):
    """torch's kernel would read and write the memory behind it."""
    first, second = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(shape))
    saved, optimizer = build(name, first, fused=True), build(name, second, fused=True)
    first.grad, second.grad = torch.ones(2, 3), torch.ones(shape)
    saved.step()
    optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(UserError, match=r"of a parameter .* has moments of \[2, 3\]\. Load the"):
        optimizer.step()


def test_a_state_of_a_scalar_is_refused_too():
    first, second = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(5000))
    saved, optimizer = build("adamw", first, fused=True), build("adamw", second, fused=True)
    first.grad, second.grad = torch.ones(()), torch.ones(5000)
    saved.step()
    optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(UserError, match=r"has moments of \[\]"):
        optimizer.step()


def test_a_grad_scaler_may_follow_once_the_kernel_was_left():
    results = []
    for fused in (None, False):
        param = nn.Parameter(torch.ones(SHAPE))
        optimizer = build_optimizer([param], "adamw", **({} if fused is None else {"fused": fused}))
        param.grad = transposed(torch.ones(SHAPE))
        optimizer.step()
        scaler = torch.amp.GradScaler("cpu")
        param.grad = scaler.scale(torch.ones(SHAPE))
        scaler.step(optimizer)
        results.append(param.detach())
    torch.testing.assert_close(*results)
