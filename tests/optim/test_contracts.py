"""One bank of contracts over every optimizer of the factory.

A new entry in the catalogue is tested without a change here.
"""

import contextlib
import copy
import importlib.util
import io
import pickle

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim import build_lr_scheduler, build_optimizer, list_optimizers, optimizer_info

LR = {
    "sgd": 0.125,
    "momentum": 0.03125,
    "nesterov": 0.03125,
    "adagrad": 0.125,
    "muon": 0.0078125,
}  # exact in binary; others 1/64
ROW = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            bool(optimizer_info(name).missing),
            reason=f"{optimizer_info(name).missing} is not installed",
        ),
    )
    for name in list_optimizers()
]
every_optimizer = pytest.mark.parametrize("name", ROW)


class Network(nn.Module):
    """A lookup table, a hidden matrix, a norm and an output layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.output = nn.Linear(8, 3)

    def forward(self, ids):
        return self.output(self.norm(torch.tanh(self.hidden(self.table(ids).mean(1)))))


class Tables(nn.Module):
    """Nothing but row-sparse tables, for sparse_adam, which takes no other gradients."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Embedding(11, 8, sparse=True)
        self.output = nn.Embedding(11, 3, sparse=True)

    def forward(self, ids):
        return self.output(ids).mean(1) + self.hidden(ids).mean(1)[:, :3]


def make_model(name, dtype=torch.float32):
    torch.manual_seed(0)
    return (Tables if name == "sparse_adam" else Network)().to(dtype)


def make(name, dtype=torch.float32, **options):
    model = make_model(name, dtype)
    optimizer = build_optimizer(model, name, **{"lr": LR.get(name, 0.015625), **options})
    getattr(optimizer, "train", lambda: None)()  # schedule-free has two modes
    return model, optimizer


def batch(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 11, (16, 3), generator=generator)
    return ids, ids.sum(1) % 3


def loss_of(model, step):
    ids, labels = batch(step)
    return nn.functional.cross_entropy(model(ids).float(), labels)


def train(model, optimizer, steps, scheduler=None):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def values(model, optimizer):
    """Return the parameters; a lazy optimizer first brings the rows it deferred up to date."""
    getattr(optimizer, "flush", lambda: None)()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def as_stored(optimizer):
    """Inside, the state dicts of a lazy optimizer hold rows as stored, which a resume needs."""
    return getattr(optimizer, "deferred", contextlib.nullcontext)()


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    assert left
    for name in left:
        torch.testing.assert_close(
            left[name],
            right[name],
            **(tolerance or {"rtol": 0, "atol": 0}),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@every_optimizer
def test_whether_the_step_follows_the_scale_of_the_gradient_is_as_said(name):
    steps = []
    for scale in (1.0, 16.0):
        model, optimizer = make(
            name,
            **({"weight_decay": 0.0} if "weight_decay" in optimizer_info(name).options else {}),
        )
        before = values(model, optimizer)
        (loss_of(model, 0) * scale).backward()
        optimizer.step()
        steps.append(
            torch.cat(
                [(after - before[key]).flatten() for key, after in values(model, optimizer).items()]
            )
        )
    expected = 1.0 if optimizer_info(name).scale_free else 16.0
    assert (steps[1].norm() / steps[0].norm()).item() == pytest.approx(expected, rel=0.02)


def test_the_bank_sees_every_optimizer():
    missing = {
        name: optimizer_info(name).missing
        for name in list_optimizers()
        if optimizer_info(name).missing
    }
    assert len(ROW) == 14
    for name, library in missing.items():
        assert library in ("bitsandbytes", "schedulefree")
        assert importlib.util.find_spec(library) is None
        with pytest.raises(
            UserError,
            match=f"'{name}' needs {library}, which is not installed. Run: pip install {library}",
        ):
            build_optimizer(make_model(name), name)


@every_optimizer
def test_the_loss_falls(name):
    model, optimizer = make(name)
    losses = train(model, optimizer, [0] * 60)  # one batch, learned by heart
    assert losses[-1] < 0.8 * losses[0]


@every_optimizer
def test_two_runs_are_equal_to_the_bit(name):
    runs = [make(name) for _ in range(2)]
    assert train(*runs[0], range(8)) == train(*runs[1], range(8))
    assert_same(values(*runs[0]), values(*runs[1]))


def through_torch_save(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_optimizer
@pytest.mark.parametrize(
    "transport",
    [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state)), through_torch_save],
)
def test_a_resumed_run_equals_one_that_was_not_interrupted(name, transport):
    options = {"overrides": [{"pattern": "hidden.weight", "lr": 0.03125}]}
    model, optimizer = make(name, **options)
    train(model, optimizer, range(5))
    with as_stored(optimizer):
        weights, state = transport((dict(model.state_dict()), optimizer.state_dict()))
    train(model, optimizer, range(5, 10))
    resumed, fresh = make(name, **options)
    with as_stored(fresh):
        resumed.load_state_dict(weights)
        fresh.load_state_dict(state)
    train(resumed, fresh, range(5, 10))
    assert_same(values(model, optimizer), values(resumed, fresh))


@every_optimizer
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_a_copied_model_and_optimizer_go_on_alike(name, copied):
    if name == "adamw_8bit":
        pytest.skip(
            "an optimizer object of bitsandbytes 0.50 loses its settings when copied; "
            "its state_dict does not"
        )
    pair = make(name)
    train(*pair, range(4))
    twin = copied(pair)
    assert train(*pair, range(4, 8)) == train(*twin, range(4, 8))
    assert_same(values(*pair), values(*twin))


@every_optimizer
def test_saving_the_state_changes_nothing(name):
    pair, saved_often = make(name), make(name)
    train(*pair, range(6))
    for step in range(6):
        train(*saved_often, [step])
        saved_often[1].state_dict()
    assert_same(values(*pair), values(*saved_often))


@every_optimizer
def test_groups_have_their_own_lr_and_decay(name):
    takes_decay = "weight_decay" in optimizer_info(name).options
    still = {"overrides": [{"pattern": "hidden.weight", "lr": 0.0}]}
    model, optimizer = make(name, **still)
    start = values(model, optimizer)
    train(model, optimizer, range(4))
    end = values(model, optimizer)
    assert torch.equal(start["hidden.weight"], end["hidden.weight"])
    assert not torch.equal(start["output.weight"], end["output.weight"])
    if takes_decay:
        model, optimizer = make(
            name,
            overrides=[
                {"pattern": "hidden.weight", "lr": 0.0},
                {"pattern": "output.weight", "weight_decay": 0.5},
            ],
        )
        train(model, optimizer, range(4))
        decayed = values(model, optimizer)
        assert torch.equal(start["hidden.weight"], decayed["hidden.weight"])
        assert not torch.equal(end["output.weight"], decayed["output.weight"])


@every_optimizer
def test_zero_gradients_move_nothing_where_there_is_no_decay(name):
    model, optimizer = make(name, weight_decay=0.0)
    start = values(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model, 0) * 0).backward()
        optimizer.step()
    assert_same(start, values(model, optimizer))


@every_optimizer
def test_a_parameter_without_a_gradient_is_left_alone(name):
    model, optimizer = make(name)
    start = values(model, optimizer)
    loss_of(model, 0).backward()
    model.output.weight.grad = None
    optimizer.step()
    end = values(model, optimizer)
    assert torch.equal(start["output.weight"], end["output.weight"])
    assert not torch.equal(start["hidden.weight"], end["hidden.weight"])
    optimizer.zero_grad()
    optimizer.step()  # no gradient at all


@every_optimizer
def test_the_layout_of_a_parameter_in_memory_does_not_matter(name):
    dense, strided = make_model(name), make_model(name)
    for parameter in strided.parameters():
        if parameter.ndim == 2:
            wide = torch.empty(parameter.shape[1], 2 * parameter.shape[0])  # transposed, with gaps
            parameter.data = wide.t()[::2].copy_(parameter.data)
            assert not parameter.is_contiguous()
    pairs = []
    for model in (dense, strided):
        optimizer = build_optimizer(model, name, lr=0.015625)
        getattr(optimizer, "train", lambda: None)()
        train(model, optimizer, range(5))
        pairs.append(values(model, optimizer))
    # Muon's bf16 products may be summed in another order
    assert_same(
        *pairs, **({"rtol": 0, "atol": 2e-3} if name == "muon" else {"rtol": 1e-5, "atol": 1e-6})
    )


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parameters_keep_their_dtype(name, dtype):
    if name == "adamw_8bit" and dtype == torch.float64:
        pytest.skip("bitsandbytes has no float64 kernels")
    model, optimizer = make(name, dtype)
    losses = train(model, optimizer, [0] * 20)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert losses[-1] < losses[0]


@every_optimizer
def test_lr_may_be_a_tensor(name):
    lr = LR.get(name, 0.015625)
    as_number, as_tensor = make(name, lr=lr), make(name, lr=torch.tensor(lr))
    train(*as_number, range(5))
    train(*as_tensor, range(5))
    assert_same(values(*as_number), values(*as_tensor), rtol=1e-5, atol=1e-7)


@every_optimizer
@pytest.mark.parametrize("as_lr", [float, torch.tensor])
def test_a_schedule_drives_every_group_from_its_own_lr(name, as_lr):
    model, optimizer = make(
        name, lr=as_lr(0.25), overrides=[{"pattern": "hidden.weight", "lr": 0.5}]
    )
    scheduler = build_lr_scheduler(
        optimizer, "linear", num_steps=8, warmup_steps=4, min_lr_ratio=0.0
    )
    assert any("hidden.weight" in group["name"] for group in optimizer.param_groups)
    for factor in (0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0):
        for group in optimizer.param_groups:
            assert float(group["lr"]) == factor * (
                0.5 if "hidden.weight" in group["name"] else 0.25
            )
        before = values(model, optimizer)
        train(model, optimizer, [0], scheduler)
    if name != "schedule_free_adamw":  # whose averaging goes on
        assert_same(before, values(model, optimizer))  # the last step had lr 0


@every_optimizer
def test_a_closure_is_evaluated_once_and_its_loss_returned(name):
    plain, closed = make(name), make(name)
    expected = train(*plain, range(4))
    calls = []
    for step in range(4):

        def closure(step=step):
            calls.append(step)
            closed[1].zero_grad()
            loss = loss_of(closed[0], step)
            loss.backward()
            return loss

        assert closed[1].step(closure).item() == expected[step]
    assert calls == [0, 1, 2, 3]
    assert_same(values(*plain), values(*closed))


REFERENCES = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "sparse_adam": (torch.optim.SparseAdam, {}),
    "lazy_adamw": (torch.optim.AdamW, {}),
    "adafactor": (torch.optim.Adafactor, {}),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-9)], ids=str
)
def test_the_result_is_that_of_torch(name, dtype, tolerance):
    reference_class, options = REFERENCES[name]
    decay = {"weight_decay": 0.1} if "weight_decay" in optimizer_info(name).options else {}
    model, optimizer = make(name, dtype, lr=0.01, no_decay=(), **decay)
    reference = make_model(name, dtype)
    oracle = reference_class(reference.parameters(), lr=0.01, **decay, **options)
    train(model, optimizer, range(40))
    train(reference, oracle, range(40))
    assert_same(values(model, optimizer), values(reference, oracle), rtol=0, atol=tolerance)


@every_optimizer
def test_accelerate_prepares_it(name):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another test's may hold a GPU
    plain, (model, optimizer) = make(name), make(name)
    model, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    getattr(prepared, "train", lambda: None)()
    assert train(*plain, range(5)) == train(model, prepared, range(5))
    assert_same(values(*plain), values(model, optimizer))
    assert {group["optimizer"] for group in prepared.param_groups} == {name}


@every_optimizer
# torch's Adagrad makes sparse tensors of its own
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_the_sparse_column_says_what_happens(name):
    """A table with row-sparse gradients against the same one with dense gradients.

    Row 3 has a gradient at the first step only.
    """
    tables, support = [], optimizer_info(name).sparse
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(5, 4, sparse=sparse)
        optimizer = build_optimizer(table, name, lr=0.0625, weight_decay=0.0)
        getattr(optimizer, "train", lambda: None)()
        for ids in ([0, 3, 3], [0, 1], [1, 2], [0, 2]):
            optimizer.zero_grad()
            table(torch.tensor(ids)).square().sum().backward()
            if sparse and support == "none":
                with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
                    optimizer.step()
                return
            if not sparse and name == "sparse_adam":
                with pytest.raises(RuntimeError, match="does not support dense gradients"):
                    optimizer.step()
                break
            optimizer.step()
            if ids == [0, 3, 3]:
                row = table.weight[3].detach().clone()
        getattr(optimizer, "flush", lambda: None)()
        tables.append(table.weight.detach())
    if support == "exact":
        torch.testing.assert_close(tables[1], tables[0], rtol=0, atol=1e-6)
    else:
        assert support == "lazy"
        assert torch.equal(tables[1][3], row)


@every_optimizer
def test_state_bytes_are_those_of_the_state(name):
    matrix = (
        nn.Embedding(1024, 1024, sparse=True)
        if name == "sparse_adam"
        else nn.Linear(1024, 1024, bias=False)
    )
    # without Newton-Schulz, whose bf16 products take half a minute on a CPU without bf16
    optimizer = build_optimizer(matrix, name, **({"ns_steps": 0} if name == "muon" else {}))
    getattr(optimizer, "train", lambda: None)()
    (matrix(torch.arange(1024)) if name == "sparse_adam" else matrix.weight).sum().backward()
    optimizer.step()
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    measured = (
        sum(value.numel() * value.element_size() for value in states if value.numel() > 1) / 2**20
    )
    assert measured == pytest.approx(optimizer_info(name).state_bytes, rel=0.02)


@every_optimizer
def test_the_state_of_another_optimizer_is_refused(name):
    others = [
        other for other in list_optimizers() if other != name and not optimizer_info(other).missing
    ]
    assert len(others) >= 11
    model, optimizer = make(name)
    train(model, optimizer, range(2))
    state = through_torch_save(optimizer.state_dict())
    assert {group["optimizer"] for group in state["param_groups"]} == {name}
    for other in others:
        if other == "adamw_8bit":
            continue  # bitsandbytes 0.50 has a load_state_dict of its own, which calls no hooks
        _, mine = make(other)
        with pytest.raises(
            UserError,
            match=f"is of {name}, but this run uses {other}\\.|is not the state of a LazyAdamW",
        ):
            mine.load_state_dict(state)
