"""Random programs of ordinary actions, on a model that is stepped lazily and on its dense twin.

Both give the same numbers at every moment.
"""

import copy
import io
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from finetune.optim import LazyAdamW

ROWS, WIDTH = 16, 3
ALMOST = 1e-9  # in float64, with steps of up to 0.05
EVERY = torch.arange(ROWS)
IDS = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=5)
VALUE = st.sampled_from([-1.0, 0.0, 0.25, 2.0])


class Side:
    """A model and its optimizer, and what the actions may do to them."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.kind, self.model = kind, nn.Embedding(ROWS, WIDTH, dtype=torch.float64)
        self.optimizer, self.saved, self.average = self.build(self.model), None, None
        self.save(deferred=True)
        self.start = self.saved

    def build(self, model):
        options = {"lr": 0.05, "weight_decay": 0.3}
        if self.kind == "lazy":
            return LazyAdamW(model.parameters(), embeddings=[model], **options)
        return torch.optim.AdamW(model.parameters(), foreach=False, **options)

    def train(self, ids, scale):
        self.optimizer.zero_grad()
        (self.model(torch.tensor(ids)).sin().sum() * scale).backward()
        self.optimizer.step()

    def train_through_the_weight(self, ids, scale):
        self.optimizer.zero_grad()
        (F.embedding(torch.tensor(ids), self.model.weight).cos().sum() * scale).backward()
        self.optimizer.step()

    def train_by_grad(self, ids, through):
        weight = self.model.weight
        rows = F.embedding(torch.tensor(ids), weight) if through else self.model(torch.tensor(ids))
        (weight.grad,) = torch.autograd.grad(rows.sin().sum(), [weight])
        self.optimizer.step()

    def clear_the_state(self):
        self.optimizer.state.clear()

    def step_without_gradient(self):
        self.optimizer.zero_grad()
        self.optimizer.step()

    def read(self, how):
        with torch.no_grad():
            return {
                "norm": lambda: self.model.weight.norm(),
                "rows": lambda: self.model(EVERY[3:9]),
                "data": lambda: self.model.weight.data[2:5] + 0,
                "state": lambda: self.model.state_dict()["weight"] + 0,
                "numpy": lambda: torch.tensor(self.model.weight.detach().numpy()),
                "product": lambda: self.model.weight @ self.model.weight.T,
            }[how]()

    def write(self, how, row, value):
        weight = self.model.weight
        with torch.no_grad():
            if how == "row":
                weight[row] = value
            elif how == "data":
                weight.data[row:] *= 0.5
            elif how == "mean":
                weight[row] = weight.mean(0)
            elif how == "state":
                self.model.state_dict()["weight"][row].fill_(value)
            elif how == "load":
                state = self.model.state_dict()["weight"].clone()
                state[row] = value
                self.model.load_state_dict({"weight": state})
            else:
                weight.data = weight.data + value

    def go_on_as_a_copy(self):
        pair = self.model, self.optimizer
        self.model, self.optimizer = copy.deepcopy(pair)

    def go_on_with_a_copy_of_the_model(self):
        """The copy is a plain model, and gets an optimizer with the state of the old one."""
        model = copy.deepcopy(self.model)
        state = self.optimizer.state_dict()
        self.optimizer = self.build(model)
        self.model = model
        self.optimizer.load_state_dict(state)

    def save(self, deferred):
        with self.optimizer.deferred() if deferred and self.kind == "lazy" else torch.no_grad():
            file = io.BytesIO()
            torch.save((self.model.state_dict(), self.optimizer.state_dict()), file)
        self.saved = file.getvalue(), deferred

    def load(self, order, start=False, copied=False):
        content, deferred = self.start if start else self.saved
        weights, state = torch.load(io.BytesIO(content), weights_only=True)
        with self.optimizer.deferred() if deferred and self.kind == "lazy" else torch.no_grad():
            for part in order:
                if part == "model" and copied and not deferred:  # a write is of rows as of now
                    with torch.no_grad():
                        self.model.weight.copy_(weights["weight"])
                elif part == "model":
                    self.model.load_state_dict(weights)
                else:
                    self.optimizer.load_state_dict(state)

    def evaluate(self):
        self.model.eval()
        with torch.inference_mode():
            loss = self.model(EVERY).square().mean()
            norm = self.model.weight.sum()
        self.model.train()
        return torch.tensor([float(loss), float(norm)])

    def set_option(self, key, value):
        self.optimizer.param_groups[0][key] = value

    def averages(self):
        if self.average is None:
            self.average = AveragedModel(self.model)
        self.average.update_parameters(self.model)
        return self.average.module.weight + 0

    def flush(self):
        if self.kind == "lazy":
            self.optimizer.flush()

    def inside_flushed(self, row, value):
        with self.optimizer.flushed() if self.kind == "lazy" else torch.no_grad():
            seen = self.model.weight.detach() + 0
            if value:
                with torch.no_grad():
                    self.model.weight[row] = value
        return seen

    def another_optimizer(self, ids):
        other = torch.optim.SGD(self.model.parameters(), lr=0.1)
        other.zero_grad()
        self.model(torch.tensor(ids)).sin().sum().backward()
        other.step()


ROW = st.integers(0, ROWS - 1)
ACTIONS = st.one_of(
    st.tuples(st.just("train"), IDS, st.sampled_from([1.0, 1e-4, 0.0])),
    st.tuples(st.just("train"), IDS, st.just(1.0)),
    st.tuples(st.just("train_through_the_weight"), IDS, st.just(1.0)),
    st.tuples(st.just("step_without_gradient")),
    st.tuples(
        st.just("read"), st.sampled_from(["norm", "rows", "data", "state", "numpy", "product"])
    ),
    st.tuples(
        st.just("write"),
        st.sampled_from(["row", "data", "mean", "state", "load", "new"]),
        ROW,
        VALUE,
    ),
    st.tuples(st.just("go_on_as_a_copy")),
    st.tuples(st.just("go_on_with_a_copy_of_the_model")),
    st.tuples(st.just("save"), st.booleans()),
    st.tuples(
        st.just("load"), st.permutations(["model", "optimizer"]), st.booleans(), st.booleans()
    ),
    st.tuples(st.just("train_by_grad"), IDS, st.booleans()),
    st.tuples(st.just("clear_the_state")),
    st.tuples(st.just("evaluate")),
    st.tuples(st.just("set_option"), st.just("lr"), st.sampled_from([0.0, 0.01, 0.05])),
    st.tuples(st.just("set_option"), st.just("weight_decay"), st.sampled_from([0.0, 0.3])),
    st.tuples(
        st.just("set_option"), st.just("betas"), st.sampled_from([(0.9, 0.999), (0.8, 0.99)])
    ),
    st.tuples(st.just("averages")),
    st.tuples(st.just("flush")),
    st.tuples(st.just("inside_flushed"), ROW, VALUE),
    st.tuples(st.just("another_optimizer"), IDS),
)
STEPS = st.lists(st.tuples(st.just("train"), IDS, st.just(1.0)), min_size=2, max_size=6)


PROGRAMS = given(STEPS, st.lists(ACTIONS, min_size=1, max_size=14), STEPS)


@settings(max_examples=40, deadline=None, derandomize=True)
@PROGRAMS
def test_a_program_gives_the_same_numbers(before, program, after):
    compare(before, program, after)


@pytest.mark.slow
@settings(max_examples=800, deadline=None)
@PROGRAMS
def test_many_programs_give_the_same_numbers(before, program, after):
    compare(before, program, after)


def compare(before, program, after):
    sides = Side("lazy"), Side("dense")
    for action, *arguments in [*before, *program, *after]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours, theirs = (getattr(side, action)(*arguments) for side in sides)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=ALMOST, msg=f"after {action}")
    now = [side.model.weight.detach() + 0 for side in sides]
    torch.testing.assert_close(*now, rtol=0, atol=ALMOST)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(STEPS, st.lists(st.sampled_from(["norm", "rows", "data", "state", "numpy"]), max_size=4))
def test_reads_change_not_one_bit_of_the_program(steps, reads):
    watched, quiet = Side("lazy"), Side("lazy")
    for action, *arguments in steps * 2:
        for how in reads:
            watched.read(how)
        watched.evaluate()
        for side in (watched, quiet):
            getattr(side, action)(*arguments)
    with watched.optimizer.deferred(), quiet.optimizer.deferred():
        assert torch.equal(watched.model.state_dict()["weight"], quiet.model.state_dict()["weight"])
