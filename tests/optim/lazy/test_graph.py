"""Autograd on the weight of a lazily stepped table, and torch.func, next to a plain weight."""

import pytest
import torch
from torch import nn
from torch.autograd import functional, graph
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional as F

from finetune.errors import UserError
from tests.optim.lazy.test_ways import EVERY, ROWS, WIDTH, batch, error, stored, train, twins

ONES = torch.ones(ROWS, WIDTH)


def square(weight):
    return (weight**2).sum()


def used(model):
    return model.emb(batch(3)).sin().sum()


def by_hook(model, register):
    seen = []
    handle = register(model.emb.weight, lambda grads: seen.append(grads))
    (square(model.emb.weight) * 2).backward()
    handle.remove()
    model.emb.weight.grad = None
    return seen[0][0] if isinstance(seen[0], tuple | list) else seen[0]


def of_a_view(model, view):
    part = view(model.emb.weight)
    return torch.autograd.grad((part**3).sum(), part)[0]


def kept(model):
    part = model.emb.weight[2:5]
    part.retain_grad()
    (part**3).sum().backward()
    model.emb.weight.grad = None
    return part.grad


def backward(model, *args, **options):
    weight = model.emb.weight
    torch.autograd.backward(*args, **options)
    gradient, weight.grad = weight.grad, None
    return gradient


def first_node(weight):
    """Return the node that adds to `weight.grad`, by the way that engines of others go."""
    return weight.expand_as(weight).grad_fn.next_functions[0][0]


def by_node(weight, hook, kept=[]):  # noqa: B006
    kept[:] = [first_node(weight)]  # a node lives as long as somebody holds it
    return kept[0].register_prehook(hook)


def twice(model):
    (first,) = torch.autograd.grad(square(model.emb.weight), model.emb.weight, create_graph=True)
    return torch.autograd.grad(first.sum(), model.emb.weight)[0]


WAYS = {
    "grad": lambda m: torch.autograd.grad(used(m), m.emb.weight)[0],
    "grad of a list": lambda m: torch.autograd.grad(used(m), [m.emb.weight])[0],
    "grad of a dict": lambda m: torch.autograd.grad(
        used(m), {"w": m.emb.weight}, allow_unused=True, materialize_grads=True
    )["w"],
    "grad through the weight": lambda m: torch.autograd.grad(square(m.emb.weight), m.emb.weight)[0],
    "grad through F.embedding": lambda m: torch.autograd.grad(
        F.embedding(EVERY, m.emb.weight).square().sum(), m.emb.weight
    )[0],
    "grad of the weight itself": lambda m: torch.autograd.grad(m.emb.weight, m.emb.weight, ONES)[0],
    "grad with the weight as the vector": lambda m: torch.autograd.grad(
        m.emb.weight * 2, m.emb.weight, m.emb.weight.detach()
    )[0],
    "grad twice": twice,
    "grad of a slice": lambda m: of_a_view(m, lambda w: w[3:9]),
    "grad of a row": lambda m: of_a_view(m, lambda w: w[30]),
    "grad of a transposed slice": lambda m: of_a_view(m, lambda w: w.T[:, 2:]),
    "grad of an alias": lambda m: of_a_view(m, lambda w: w.detach().requires_grad_()),
    "a slice that keeps its gradient": kept,
    "edge": lambda m: torch.autograd.grad(
        square(m.emb.weight), graph.get_gradient_edge(m.emb.weight)
    )[0],
    "backward with inputs": lambda m: backward(m, used(m), inputs=[m.emb.weight]),
    "backward of the weight": lambda m: backward(m, m.emb.weight, ONES),
    "backward of the weight with inputs": lambda m: backward(
        m, [m.emb.weight], [m.emb.weight.detach()], inputs=[m.emb.weight]
    ),
    "hook": lambda m: by_hook(m, lambda w, hook: w.register_hook(hook)),
    "multi_grad_hook": lambda m: by_hook(
        m, lambda w, hook: graph.register_multi_grad_hook((w,), hook)
    ),
    "hook on the node": lambda m: by_hook(m, by_node),
    "functional.vjp": lambda m: functional.vjp(square, m.emb.weight)[1],
    "functional.jvp": lambda m: functional.jvp(square, m.emb.weight, ONES)[1],
    "functional.hvp": lambda m: functional.hvp(lambda w: (w**3).sum(), m.emb.weight, ONES)[1],
    "functional.jacobian": lambda m: functional.jacobian(square, m.emb.weight),
    "functional.jacobian, vectorized": lambda m: functional.jacobian(
        lambda w: (w**2).sum(1), m.emb.weight, vectorize=True
    ),
    "functional.hessian": lambda m: functional.hessian(lambda w: (w[:2] ** 3).sum(), m.emb.weight),
}


@pytest.mark.parametrize("lag", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_a_gradient_is_that_of_a_plain_weight(name, lag):
    (model, optimizer), (twin, _) = twins()
    if not lag:
        optimizer.flush()
    for each in (model, twin):
        each.emb.weight.grad = None
    before = stored(model.emb.weight).clone()
    ours, theirs = WAYS[name](model), WAYS[name](twin)
    ours = ours.to_dense() if ours.is_sparse else ours
    assert float(theirs.abs().sum()) > 0
    assert error(ours, theirs) <= 3e-4
    assert torch.equal(stored(model.emb.weight), before)


def test_the_node_of_the_weight_is_found_through_a_view():
    (model, _), _ = twins()
    weight = model.emb.weight
    assert first_node(weight) is graph.get_gradient_edge(weight).node
    assert first_node(weight).variable is weight


def test_a_loop_on_autograd_grad_is_on_the_trajectory():
    pairs = twins()
    for model, optimizer in pairs:
        for step in range(20, 30):
            (model.emb.weight.grad,) = torch.autograd.grad(
                model.emb(batch(step)).sin().sum(), [model.emb.weight]
            )
            optimizer.step()
    assert error(pairs[0][0].emb(EVERY), pairs[1][0].emb(EVERY)) <= 3e-5


# torch.func


def parameters(model, copy=False):
    return {n: p.detach().clone() if copy else p.detach() for n, p in model.emb.named_parameters()}


def called(model):
    return lambda p, ids=EVERY: functional_call(model.emb, p, (ids,)).square().sum()


X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
TRANSFORMS = {
    "grad": lambda m: grad(called(m))(parameters(m))["weight"],
    "vjp": lambda m: vjp(called(m), parameters(m))[0],
    "jvp": lambda m: jvp(square, (m.emb.weight.detach(),), (ONES,))[1],
    "gradients of each example": lambda m: vmap(grad(called(m)), (None, 0))(
        parameters(m), EVERY[:6].view(2, 3)
    )["weight"],
    "grad beside the weight": lambda m: grad(lambda x: (x @ m.emb.weight.detach().T).sum())(X),
    "grad beside the module": lambda m: grad(lambda x: (m.emb(EVERY[:3]) * x).sum())(X),
    "vmap beside the weight": lambda m: vmap(lambda x: m.emb.weight.detach() @ x)(X),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.func.jvp
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_refused_while_rows_lag_and_right_afterwards(name):
    (model, optimizer), (twin, _) = twins()
    with pytest.raises(UserError, match=r"torch\.func"):
        TRANSFORMS[name](model)
    with optimizer.flushed():
        assert error(TRANSFORMS[name](model), TRANSFORMS[name](twin)) <= 3e-4
    optimizer.flush()
    assert error(TRANSFORMS[name](model), TRANSFORMS[name](twin)) <= 3e-4
    train(model, optimizer, range(20, 25))


def test_a_transform_of_copies_is_right():
    (model, _), (twin, _) = twins()
    ours, theirs = (grad(called(m))(parameters(m, copy=True))["weight"] for m in (model, twin))
    assert error(ours, theirs) <= 3e-4


# What no subclass of a tensor sees: the guide names these, and what to write instead


def test_a_clone_is_plain():
    (model, _), (twin, _) = twins()
    clone = model.emb.weight.detach().clone()
    assert type(clone) is torch.Tensor
    assert error(torch.Tensor(clone), twin.emb.weight.detach()) <= 3e-5  # which reads memory
    assert isinstance(model.emb, nn.Embedding)
