"""The rest of the ways to touch a lazily stepped embedding, and their count.

Each is right next to a dense twin, or it answers in a sentence.
"""

import copy

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim.lazy.adamw import LazyAdamW
from finetune.optim.lazy.table import stored
from tests.optim.lazy import test_ways as ways
from tests.optim.lazy.test_ways import EVERY, RIGHT, batch, error, now, train, twins


def go_on(pair, steps=range(20, 30)):
    train(*pair, steps)


def to_cpu(pair):
    pair[0].to("cpu"), pair[0].cpu(), pair[0].float(), pair[0].to(torch.float32)
    go_on(pair)


def frozen(pair):
    model, optimizer = pair
    model.emb.weight.requires_grad_(False)
    for step in range(20, 30):
        optimizer.zero_grad()
        model.head(model.emb(batch(step))).sum().backward()
        optimizer.step()


def frozen_and_thawed(pair):
    frozen(pair)
    pair[0].emb.weight.requires_grad_(True)
    go_on(pair)


def rounds_of_state_dicts(pair):
    model, optimizer = pair
    for step in range(20, 30):
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, [step])


def checkpointed_both_ways(pair):
    def loss(model, step):
        reentrant = step % 2 == 0
        hidden = torch.ones(1, requires_grad=True)
        rows = torch.utils.checkpoint.checkpoint(
            lambda one: model.emb(batch(step)) * one, hidden, use_reentrant=reentrant
        )
        return rows.sin().sum()

    train(*pair, range(20, 30), loss)


def hooks_on_the_weight(pair):
    model, _ = pair
    seen = []
    model.emb.weight.register_hook(lambda grad: seen.append(grad.shape))
    model.emb.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    go_on(pair)
    assert len(seen) == 20


def forward_hooks(pair):
    model, _ = pair
    seen = []
    handle = model.emb.register_forward_hook(lambda m, i, out: seen.append(m.weight.norm().item()))
    go_on(pair)
    handle.remove()
    assert len(seen) == 10


def zero_grad_of_the_module(pair):
    model, optimizer = pair
    for step in range(20, 30):
        model.zero_grad()
        ways.loss_of(model, step).backward()
        optimizer.step()


def accumulated(pair):
    model, optimizer = pair
    for step in range(20, 26):
        optimizer.zero_grad()
        for part in range(3):
            ways.loss_of(model, 3 * step + part).backward()
            model.emb.weight.norm()
        optimizer.step()


def gradients_deleted(pair):
    model, optimizer = pair
    for step in range(20, 30):
        ways.loss_of(model, step + 30).backward()
        del model.emb.weight.grad
        ways.loss_of(model, step).backward()
        optimizer.step()
        del model.emb.weight.grad


def a_shallow_copy_of_the_optimizer(pair):
    model, optimizer = pair
    train(model, copy.copy(optimizer), range(20, 25))
    train(model, optimizer, range(25, 30))
    copy.deepcopy(model)


def a_compiled_step(pair):
    model, optimizer = pair
    step_once = optimizer.step
    if isinstance(optimizer, LazyAdamW):
        step_once = torch.compile(step_once, backend="eager")
    for step in range(20, 24):
        optimizer.zero_grad()
        ways.loss_of(model, step).backward()
        step_once()


def a_copy_trained_by_adamw(pair):
    model, _ = pair
    other = copy.deepcopy(model)
    train(other, torch.optim.AdamW(other.parameters(), lr=0.05), range(20, 30))
    model.load_state_dict(other.state_dict())


def named_parameters_swapped(pair):
    """As code does that evaluates other weights and puts the own ones back."""
    model, _ = pair
    with torch.no_grad():
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.data = torch.zeros_like(p)
        assert not model(EVERY).any()
        for name, p in model.named_parameters():
            p.data = kept[name]
    go_on(pair)


RIGHT_WAYS = [to_cpu, frozen, frozen_and_thawed, rounds_of_state_dicts, checkpointed_both_ways]
RIGHT_WAYS += [hooks_on_the_weight, forward_hooks, zero_grad_of_the_module, accumulated]
RIGHT_WAYS += [a_shallow_copy_of_the_optimizer, a_compiled_step]
RIGHT_WAYS += [gradients_deleted, a_copy_trained_by_adamw, named_parameters_swapped]


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("way", RIGHT_WAYS)
def test_it_is_as_with_the_dense_twin(way):
    pairs = twins()
    for pair in pairs:
        way(pair)
    assert error(now(pairs[0][0]), now(pairs[1][0])) <= 5 * RIGHT[torch.float32]
    assert error(pairs[0][0].emb.weight, pairs[1][0].emb.weight) <= 5 * RIGHT[torch.float32]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model.emb, "weight", Doubled())
    return model(EVERY)


REFUSED = {  # in a sentence of ours, or an error of torch's
    "half": (lambda m: m.half(), UserError),
    "double": (lambda m: m.double(), UserError),
    "bfloat16": (lambda m: m.bfloat16(), UserError),
    "parametrization": (parametrized, Exception),
    "export": (lambda m: torch.export.export(m, (EVERY,)), Exception),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_or_right(name):
    (model, _), (twin, _) = twins()
    way, refusal = REFUSED[name]
    expected = way(twin)
    try:
        found = way(model)
    except refusal:
        return
    assert refusal is Exception, "this has to be refused"
    if name == "export":
        found, expected = found.module()(EVERY), expected.module()(EVERY)
    assert error(found, expected) <= 5 * RIGHT[torch.float32]


def test_a_half_that_was_refused_leaves_the_run_as_it_was():
    pairs = twins()
    before = stored(pairs[0][0].emb.weight).clone()
    with pytest.raises(UserError, match=r"became torch\.float16"):
        pairs[0][0].emb.half()
    pairs[0][0].emb.float()
    assert pairs[0][0].emb.weight.dtype == torch.float32
    assert error(stored(pairs[0][0].emb.weight), before) <= 1e-2


def test_the_ways_are_as_many_as_were_found():
    """76 ways of ordinary code were found; this bank has those and more."""
    tables = [ways.READS, ways.WRITES, ways.TRAINING, ways.DENSE, RIGHT_WAYS, REFUSED]
    others = [name for name in vars(ways) if name.startswith("test_")]
    assert sum(map(len, tables)) + len(others) >= 170
