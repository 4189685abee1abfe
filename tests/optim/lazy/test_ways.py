"""Ordinary ways to touch the weight of a lazily stepped embedding, next to a dense twin.

Each way is right, or it raises or warns in a sentence. A read changes not one stored bit.
"""

import copy
import gc
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from finetune.errors import UserError
from finetune.optim import to_adamw_state
from finetune.optim.lazy.adamw import LazyAdamW
from finetune.optim.lazy.table import stored

ROWS, WIDTH = 40, 6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
OPTIONS = {"lr": 0.05, "weight_decay": 0.3}  # so that a stale row would show
RIGHT = {torch.float32: 3e-5, torch.bfloat16: 0.03}
EVERY = torch.arange(ROWS)


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.emb = nn.Embedding(ROWS, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, ROWS, bias=False, dtype=dtype)

    def forward(self, ids):
        return self.head(self.emb(ids))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(24 if step % 3 else 8, (6,), generator=generator)


def loss_of(model, step):
    return model.emb(batch(step)).float().sin().sum()


def train(model, optimizer, steps, loss=loss_of):
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def twins(dtype=torch.float32, steps=20):
    """Return (model, optimizer) trained lazily, so that rows lag, and densely.

    The dense twin of a bfloat16 table is in float32, as the masters are.
    """
    pairs = []
    for kind in ("lazy", "dense"):
        torch.manual_seed(0)
        model = Model(dtype)
        if kind == "lazy":
            parameters = [model.emb.weight]
            optimizer = LazyAdamW(parameters, embeddings=[model.emb], **OPTIONS)
        else:
            model = model.float()
            optimizer = torch.optim.AdamW([model.emb.weight], foreach=False, **OPTIONS)
        train(model, optimizer, range(steps))
        pairs.append((model, optimizer))
    assert not pairs[0][1]._tables[0][1].weight_is_current
    return pairs


def error(ours, theirs):
    return float((ours.detach().double() - theirs.detach().double()).abs().max())


def now(model):
    with torch.no_grad():
        return model.emb(EVERY).clone()


# Reads

READS = {
    "weight": lambda m: m.emb.weight * 1,
    "norm": lambda m: m.emb.weight.norm(),
    "detach": lambda m: m.emb.weight.detach(),
    "data": lambda m: m.emb.weight.data,
    "data clone": lambda m: m.emb.weight.data.clone(),
    "a row": lambda m: m.emb.weight[30],
    "rows in a loop": lambda m: torch.stack([row * 1 for row in m.emb.weight]),
    "a slice of data": lambda m: m.emb.weight.data[4:30, 1:3],
    "chosen rows": lambda m: m.emb.weight[torch.tensor([30, 2])],
    "a mask": lambda m: m.emb.weight[EVERY > 20],
    "index_select": lambda m: m.emb.weight.index_select(0, torch.tensor([30, 2])),
    "transposed": lambda m: m.emb.weight.T,
    "t().contiguous()": lambda m: m.emb.weight.t().contiguous(),
    "view": lambda m: m.emb.weight.view(-1)[7:],
    "split": lambda m: m.emb.weight.split(7)[3],
    "unbind": lambda m: torch.unbind(m.emb.weight)[30],
    "float": lambda m: m.emb.weight.float(),
    "double": lambda m: m.emb.weight.double(),
    "cpu": lambda m: m.emb.weight.cpu(),
    "to": lambda m: m.emb.weight.to("cpu", torch.float64),
    "clone": lambda m: m.emb.weight.clone(),
    "numpy": lambda m: torch.tensor(m.emb.weight.detach().float().numpy()),
    "tolist": lambda m: torch.tensor(m.emb.weight.tolist()),
    "item": lambda m: torch.tensor(m.emb.weight[30, 2].item()),
    "torch.stack": lambda m: torch.stack([m.emb.weight.detach()]),
    "torch.tensor of numbers": lambda m: torch.tensor([list(r) for r in m.emb.weight.detach()]),
    "new_tensor of its own": lambda m: m.emb.weight.detach().new_tensor(m.emb.weight.detach()),
    "mean": lambda m: m.emb.weight.mean(0),
    "std": lambda m: torch.std(m.emb.weight),
    "histogram": lambda m: torch.histc(m.emb.weight.detach().float(), 5, -3, 3),
    "neighbours": lambda m: F.normalize(m.emb.weight, dim=1) @ F.normalize(m.emb.weight, dim=1).T,
    "logits": lambda m: F.linear(torch.ones(2, WIDTH, dtype=m.emb.weight.dtype), m.emb.weight),
    "matmul": lambda m: torch.ones(2, WIDTH, dtype=m.emb.weight.dtype) @ m.emb.weight.T,
    "cdist": lambda m: torch.cdist(m.emb.weight.float(), m.emb.weight[:2].float(), p=1.0),
    "cat": lambda m: torch.cat([m.emb.weight, m.head.weight]),
    "einsum": lambda m: torch.einsum("vd,vd->v", m.emb.weight, m.emb.weight),
    "F.embedding": lambda m: F.embedding(EVERY, m.emb.weight),
    "F.embedding of data": lambda m: F.embedding(EVERY, m.emb.weight.data),
    "F.embedding_bag": lambda m: F.embedding_bag(EVERY.view(-1, 2), m.emb.weight),
    "torch.embedding": lambda m: torch.embedding(m.emb.weight, EVERY),
    "parameters_to_vector": lambda m: nn.utils.parameters_to_vector(m.emb.parameters()),
    "named_parameters as a checkpoint": lambda m: dict(m.named_parameters())["emb.weight"] * 1,
    "data of named_parameters": lambda m: {n: p.data for n, p in m.named_parameters()}[
        "emb.weight"
    ],
    "norms of all parameters": lambda m: sum(p.float().norm() for p in m.parameters()),
    "foreach norms": lambda m: torch.stack(torch._foreach_norm([m.emb.weight, m.head.weight])),
    "get_total_norm": lambda m: nn.utils.get_total_norm([p.data for p in m.parameters()]),
    "get_parameter": lambda m: m.get_parameter("emb.weight").sum(0),
    "a closeness test": lambda m: torch.isfinite(m.emb.weight).all().float(),
    "deepcopy of the weight": lambda m: copy.deepcopy(m.emb.weight),
    "deepcopy of the model": lambda m: copy.deepcopy(m).emb.weight,
    "deepcopy of the module": lambda m: copy.deepcopy(m.emb)(EVERY),
    "copy.copy of the module": lambda m: copy.copy(m.emb)(EVERY),
    "pickle of the model": lambda m: pickle.loads(pickle.dumps(m)).emb.weight,
    "pickle of the weight": lambda m: pickle.loads(pickle.dumps(m.emb.weight)),
    "torch.save of the model": lambda m: through_file(m, weights_only=False).emb.weight,
    "torch.save of the weight": lambda m: through_file(m.emb.weight),
    "torch.save of data": lambda m: through_file(m.emb.weight.data),
    "torch.save of a slice": lambda m: through_file(m.emb.weight.data[3:30]),
    "torch.save of the state dict": lambda m: through_file(m.state_dict())["emb.weight"],
    "state_dict": lambda m: m.state_dict()["emb.weight"],
    "state_dict keep_vars": lambda m: m.state_dict(keep_vars=True)["emb.weight"] * 1,
    "safetensors": lambda m: through_safetensors(m.state_dict())["emb.weight"],
    "from_pretrained": lambda m: nn.Embedding.from_pretrained(m.emb.weight)(EVERY),
    "from_pretrained of data": lambda m: nn.Embedding.from_pretrained(m.emb.weight.data).weight * 1,
    "nn.Parameter of data": lambda m: nn.Parameter(m.emb.weight.data) * 1,
    "a larger embedding by hand": lambda m: larger(m),
    "functional_call, state_dict": lambda m: torch.func.functional_call(
        m, m.state_dict(), (EVERY,)
    ),
    "functional_call, parameters": lambda m: torch.func.functional_call(
        m, dict(m.named_parameters()), (EVERY,)
    ),
    "functional_call, detached": lambda m: torch.func.functional_call(
        m, {n: p.detach() for n, p in m.named_parameters()}, (EVERY,)
    ),
    "stack_module_state": lambda m: torch.func.stack_module_state([m, m])[0]["emb.weight"][1],
    "load_state_dict elsewhere": lambda m: loaded(m, m.state_dict()),
    "load_state_dict of parameters": lambda m: loaded(m, dict(m.named_parameters())),
    "load_state_dict assign": lambda m: loaded(m, m.state_dict(), assign=True),
    "tied afterwards": lambda m: tied(m)(EVERY),
    "shared afterwards": lambda m: shared(m)(EVERY),
    "jit.trace": lambda m: torch.jit.trace(m, (EVERY,), check_trace=False)(EVERY),
    "compiled": lambda m: torch.compile(m, backend="eager")(EVERY),
    "DataParallel": lambda m: nn.DataParallel(m)(EVERY),
    "checkpoint": lambda m: torch.utils.checkpoint.checkpoint(m, EVERY, use_reentrant=False),
    "AveragedModel": lambda m: AveragedModel(m).module.emb.weight,
    "AveragedModel, forward": lambda m: AveragedModel(m)(EVERY),
    "inference mode": lambda m: in_inference_mode(m),
    "forward": lambda m: m(EVERY),
}


def through_file(thing, weights_only=True):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def through_safetensors(state):
    from safetensors.torch import load, save

    return load(save({name: value.contiguous() for name, value in state.items()}))


def larger(model):
    table = nn.Embedding(ROWS + 4, WIDTH, dtype=model.emb.weight.dtype)
    with torch.no_grad():
        table.weight.zero_()
        table.weight[:ROWS] = model.emb.weight
    return table.weight


def loaded(model, state, **options):
    other = Model(model.emb.weight.dtype)
    other.load_state_dict(state, **options)
    return other.emb.weight * 1


def tied(model):
    model.head.weight = model.emb.weight
    return model


def shared(model):
    other = nn.Embedding(ROWS, WIDTH, dtype=model.emb.weight.dtype)
    other.weight = model.emb.weight
    return other


def in_inference_mode(model):
    with torch.inference_mode():
        assert (model.emb.weight * 1).is_inference()
        return torch.tensor(model.emb.weight.tolist())


def values_of(way, model):
    """Return what a way reads, with and without gradients."""
    with torch.no_grad():
        first = way(model) * 1
    return first.double(), (way(model) * 1).detach().double()


TOOLS = pytest.mark.filterwarnings(  # what torch.jit and torch.compile say of themselves
    "ignore:.torch.jit.trace:DeprecationWarning",
    "ignore:.torch.jit.trace:FutureWarning",  # torch 2.14
    "ignore::torch.jit.TracerWarning",
    "ignore:The .grad attribute of a Tensor",
    "ignore:To copy construct",  # new_tensor
)


@DTYPES
@TOOLS
@pytest.mark.parametrize("name", READS)
def test_a_read_gives_rows_as_of_now_and_stores_nothing(name, dtype):
    way = READS[name]
    (model, optimizer), (twin, _) = twins(dtype)
    before = stored(model.emb.weight).clone()
    expected = values_of(way, twin)
    for ours, theirs in zip(values_of(way, model), expected):
        scale = max(1.0, float(theirs.abs().max()))
        assert error(ours, theirs) <= RIGHT[dtype] * scale
    assert torch.equal(stored(model.emb.weight), before)
    # and the run goes on as one in which nobody looked
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    (quiet, its_optimizer), _ = twins(dtype)
    for each, stepper in ((model, optimizer), (quiet, its_optimizer)):
        train(each, stepper, range(20, 25))
    assert torch.equal(stored(model.emb.weight), stored(quiet.emb.weight))


def test_rows_as_stored_would_be_seen():
    (model, _), (twin, _) = twins()
    assert error(stored(model.emb.weight), twin.emb.weight) > 100 * RIGHT[torch.float32]


# Writes

GIVEN = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)


def no_grad(way):
    def inside(model, optimizer):
        with torch.no_grad():
            way(model.emb.weight, GIVEN.to(model.emb.weight.dtype))

    return inside


def by_vector(model, optimizer):
    vector = nn.utils.parameters_to_vector(model.emb.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, model.emb.parameters())


def by_another_optimizer(model, optimizer, **options):
    other = torch.optim.SGD([model.emb.weight], lr=0.1, **options)
    other.zero_grad()
    loss_of(model, 3).backward()
    other.step()


def by_flushed(model, optimizer):
    with getattr(optimizer, "flushed", torch.no_grad)(), torch.no_grad():
        model.emb.weight[5:9] = 2.0


def by_load_in_flushed(model, optimizer):
    with getattr(optimizer, "flushed", torch.no_grad)():
        model.load_state_dict({**model.state_dict(), "emb.weight": GIVEN})


def into_state_dict(model, optimizer):
    model.state_dict()["emb.weight"].mul_(0.5)


def into_state_dict_copy(model, optimizer):
    for value in model.state_dict().values():
        value.copy_(value * 0.5)


def augmented(model, optimizer):
    with torch.no_grad():
        model.emb.weight *= 0.5
        model.emb.weight += 1


def out(weight, given):
    torch.mul(weight, 0.5, out=weight)


WRITES = {
    "copy_": no_grad(lambda w, given: w.copy_(given)),
    "copy_ of some": no_grad(lambda w, given: w[3:30].copy_(given[3:30])),
    "data.copy_": no_grad(lambda w, given: w.data.copy_(given)),
    "data =": no_grad(lambda w, given: setattr(w, "data", given.clone())),
    "data = data": no_grad(lambda w, given: setattr(w, "data", w.data * 0.5)),
    "rows = number": no_grad(lambda w, given: w.__setitem__(slice(8), 5)),
    "a row of data = number": lambda m, o: m.emb.weight.data.__setitem__(30, 5.0),
    "new rows = mean": no_grad(lambda w, given: w.__setitem__(slice(30, 34), w[:24].mean(0))),
    "masked_fill_": no_grad(lambda w, given: w.masked_fill_(given > 0.5, 0.25)),
    "index_copy_": no_grad(lambda w, given: w.index_copy_(0, EVERY[30:], given[30:])),
    "zero_ of a row": no_grad(lambda w, given: w[30].zero_()),
    "fill_ of a row of a view": no_grad(lambda w, given: w.view(-1)[7:70].fill_(0.25)),
    "fill_ of rows one by one": no_grad(lambda w, given: [row.fill_(0.1) for row in w]),
    "init": lambda m, o: nn.init.constant_(m.emb.weight, 0.1),
    "init of data": lambda m, o: nn.init.ones_(m.emb.weight.data[3:7]),
    "reset_parameters": lambda m, o: (torch.manual_seed(1), m.emb.reset_parameters()),
    "mul_": no_grad(lambda w, given: w.mul_(0.5)),
    "clamp_": no_grad(lambda w, given: w.clamp_(-0.1, 0.1)),
    "renorm_": no_grad(lambda w, given: w.renorm_(2, 0, 1.0)),
    "lerp_": no_grad(lambda w, given: w.lerp_(given, 0.5)),
    "augmented": augmented,
    "out=": no_grad(out),
    "foreach": no_grad(lambda w, given: torch._foreach_mul_([w], 0.5)),
    "foreach of data": no_grad(lambda w, given: torch._foreach_lerp_([w.data], [given], 0.5)),
    "F.relu inplace": no_grad(lambda w, given: F.relu(w, inplace=True)),
    "transposed": no_grad(lambda w, given: w.T[2].fill_(0.5)),
    "detach": lambda m, o: m.emb.weight.detach().mul_(0.5),
    "set of a slice": lambda m, o: m.emb.weight.data[1:4].mul_(2),
    "vector_to_parameters": by_vector,
    "into the state dict": into_state_dict,
    "into every entry of the state dict": into_state_dict_copy,
    "load_state_dict": lambda m, o: m.load_state_dict({**m.state_dict(), "emb.weight": GIVEN}),
    "load_state_dict in flushed": by_load_in_flushed,
    "in flushed": by_flushed,
    "sgd": by_another_optimizer,
    "sgd, foreach": lambda m, o: by_another_optimizer(m, o, foreach=True),
    "sgd with momentum": lambda m, o: by_another_optimizer(m, o, momentum=0.9),
    "an alias made before": lambda m, o: alias_of(m).mul_(0.5),
    "a parameter over the same memory": lambda m, o: nn.Parameter(m.emb.weight.data).data.mul_(0.5),
    "from_pretrained trained": lambda m, o: train_alias(m),
    "apply": lambda m, o: m.apply(init_weights),
    "swap with an average": lambda m, o: swap(m),
}


def alias_of(model):
    return dict(model.named_parameters())["emb.weight"].detach()


def init_weights(module):
    if isinstance(module, nn.Embedding):
        torch.manual_seed(2)
        module.weight.data.normal_(mean=0.0, std=0.02)
        module.weight.data[3].zero_()


def train_alias(model):
    other = nn.Embedding.from_pretrained(model.emb.weight, freeze=False)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        other(batch(step)).float().sin().sum().backward()
        optimizer.step()


def swap(model):
    with torch.no_grad():
        held = [p.clone() for p in model.parameters()]
        for p in model.parameters():
            p.copy_(torch.ones_like(p))
        model(EVERY)
        for p, value in zip(model.parameters(), held):
            p.copy_(value)


@DTYPES
@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_a_write_to_rows_as_of_now(name, dtype):
    (model, optimizer), (twin, oracle) = twins(dtype)
    for each, stepper in ((model, optimizer), (twin, oracle)):
        WRITES[name](each, stepper)
    assert error(now(model), now(twin)) <= RIGHT[dtype] * 5
    assert error(model.emb.weight, twin.emb.weight) <= RIGHT[dtype] * 5
    for each, stepper in ((model, optimizer), (twin, oracle)):
        train(each, stepper, range(20, 30))
    assert error(now(model), now(twin)) <= RIGHT[dtype] * 5


@DTYPES
def test_another_optimizer_in_turn(dtype):
    pairs = twins(dtype)
    for model, optimizer in pairs:
        other = torch.optim.SGD(model.emb.parameters(), lr=0.1)
        for step in range(20, 40):
            train(model, (optimizer, other)[step % 2], [step])
    assert error(now(pairs[0][0]), now(pairs[1][0])) <= RIGHT[dtype] * 5


# Training through the weight


def sampled_softmax(model, step):
    hidden = model.emb(batch(step)).float()
    return -(hidden @ model.emb.weight.detach().float().T).log_softmax(1)[:, step % ROWS].mean()


def towards_a_constant(model, step):
    center = model.emb.weight.detach().float().mean(0)
    return (model.emb(batch(step)).float() - center).square().sum()


def two_lookups(model, step):
    other = nn.Embedding(ROWS, WIDTH, dtype=model.emb.weight.dtype, sparse=True)
    other.weight = model.emb.weight
    ids = batch(step)
    return (model.emb(ids).float().sin() + other(ids.flip(0)).float().cos()).sum()


TRAINING = {
    "F.embedding, sparse": lambda m, s: F.embedding(batch(s), m.emb.weight, sparse=True),
    "F.embedding": lambda m, s: F.embedding(batch(s), m.emb.weight),
    "F.embedding, padding": lambda m, s: F.embedding(batch(s), m.emb.weight, -ROWS + 2),
    "F.embedding_bag, sparse": lambda m, s: F.embedding_bag(
        batch(s).view(2, 3), m.emb.weight, sparse=True
    ),
    "softmax against the detached weight": sampled_softmax,
    "towards the mean of the detached weight": towards_a_constant,
    "two lookups": two_lookups,
    "functional_call": lambda m, s: torch.func.functional_call(
        m.emb, dict(m.emb.named_parameters()), (batch(s),)
    ),
    "checkpointed": lambda m, s: torch.utils.checkpoint.checkpoint(
        m.emb, batch(s), use_reentrant=False
    ),
    "compiled": lambda m, s: torch.compile(m.emb, backend="aot_eager")(batch(s)),
}
DENSE = {
    "rows by index": lambda m, s: m.emb.weight[batch(s)],
    "a slice": lambda m, s: m.emb.weight[3:9],
    "a penalty": lambda m, s: m.emb(batch(s)).sin().sum() + m.emb.weight.square(),
    "tied afterwards": lambda m, s: tied(m)(batch(s)),
    "logits": lambda m, s: F.linear(m.emb(batch(s)), m.emb.weight),
    "vector": lambda m, s: nn.utils.parameters_to_vector(m.emb.parameters()),
}


@DTYPES
@TOOLS
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("name", TRAINING)
def test_training_through_the_weight_is_right(name, written, dtype):
    pairs = twins(dtype)
    for model, optimizer in pairs:
        if written:  # so that no row lags
            with torch.no_grad():
                model.emb.weight[1] = 0.5
        if "sparse" in name and isinstance(optimizer, torch.optim.AdamW):
            way = {  # the dense oracle takes no sparse gradients
                "F.embedding, sparse": lambda m, s: F.embedding(batch(s), m.emb.weight),
                "F.embedding_bag, sparse": lambda m, s: F.embedding_bag(
                    batch(s).view(2, 3), m.emb.weight
                ),
            }[name]
        else:
            way = TRAINING[name]
        if name == "two lookups" and isinstance(optimizer, torch.optim.AdamW):
            train(model, optimizer, range(20, 30), dense_two_lookups)
        else:
            train(model, optimizer, range(20, 30), lambda m, s, w=way: w(m, s).float().sin().sum())
    assert error(now(pairs[0][0]), now(pairs[1][0])) <= RIGHT[dtype] * 5


def dense_two_lookups(model, step):
    ids = batch(step)
    return (model.emb(ids).sin() + model.emb(ids.flip(0)).cos()).sum().sin()


@pytest.mark.parametrize("name", DENSE)
def test_training_through_the_weight_with_a_dense_gradient_is_refused(name):
    (model, optimizer), (twin, oracle) = twins()
    gradients = []
    for each, stepper in ((model, optimizer), (twin, oracle)):
        stepper.zero_grad()
        DENSE[name](each, 25).float().sin().sum().backward()
        gradients.append(each.emb.weight.grad)
    assert error(*gradients) <= 1e-4
    with pytest.raises(UserError, match="dense gradient"):
        optimizer.step()


# Copies that go their own way


def averaged(pair, start, **options):
    """Return the average of a model made in mid-run, as PyTorch's recipe has it."""
    model, optimizer = pair
    average = AveragedModel(model, **options)
    for step in range(start, start + 20):
        train(model, optimizer, [step])
        average.update_parameters(model)
    return average.module


@DTYPES
@pytest.mark.parametrize("start", [0, 20])
@pytest.mark.parametrize("ema", [False, True])
def test_averages(dtype, start, ema):
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if ema else {}
    if start == 0:
        pairs = []
        for kind in (0, 1):
            torch.manual_seed(0)
            model = Model(dtype if kind == 0 else torch.float32)
            if kind == 1:
                model.load_state_dict(pairs[0][0].state_dict())
            parameters = [model.emb.weight]
            optimizer = (
                LazyAdamW(parameters, embeddings=[model.emb], **OPTIONS)
                if kind == 0
                else torch.optim.AdamW(parameters, foreach=False, **OPTIONS)
            )
            pairs.append((model, optimizer))
    else:
        pairs = twins(dtype)
    ours, theirs = (averaged(pair, start, **options) for pair in pairs)
    assert type(ours.emb) is nn.Embedding
    assert type(ours.emb.weight) is nn.Parameter
    # an average in bfloat16 is rounded at every update
    assert error(ours.emb.weight, theirs.emb.weight) <= RIGHT[dtype] * 3
    assert error(now(ours), now(theirs)) <= RIGHT[dtype] * 3
    assert error(ours.state_dict()["emb.weight"], ours.emb.weight) == 0


def timm_ema(pair):
    model, optimizer = pair
    ema = copy.deepcopy(model).eval()
    for step in range(20, 40):
        train(model, optimizer, [step])
        with torch.no_grad():
            for kept, value in zip(ema.state_dict().values(), model.state_dict().values()):
                kept.copy_(0.9 * kept + 0.1 * value)
    return ema


def own_ema(pair):
    model, optimizer = pair
    shadow = {name: p.data.clone() for name, p in model.named_parameters()}
    for step in range(20, 40):
        train(model, optimizer, [step])
        for name, p in model.named_parameters():
            shadow[name].mul_(0.9).add_(p.data, alpha=0.1)
    for name, p in model.named_parameters():
        p.data.copy_(shadow[name])
    return model


@DTYPES
@pytest.mark.parametrize("ema", [timm_ema, own_ema])
def test_averages_by_hand(ema, dtype):
    ours, theirs = (ema(pair) for pair in twins(dtype))
    assert error(now(ours), now(theirs)) <= RIGHT[dtype] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_the_model_alone_is_a_plain_model(copied):
    (model, _), (twin, _) = twins()
    pairs = []
    for each in (model, twin):
        other = copied(each)
        assert type(other.emb) is nn.Embedding
        pairs.append((other, torch.optim.SGD(other.emb.parameters(), lr=0.1)))
        train(*pairs[-1], range(20, 30))
    assert error(now(pairs[0][0]), now(pairs[1][0])) <= RIGHT[torch.float32]


@DTYPES
def test_a_pair_copied_inside_flushed_goes_on(dtype):
    (model, optimizer), _ = twins(dtype)
    with optimizer.flushed():
        other, its_optimizer = copy.deepcopy((model, optimizer))
    for pair in ((model, optimizer), (other, its_optimizer)):
        train(*pair, range(20, 30))
    assert torch.equal(stored(model.emb.weight), stored(other.emb.weight))


@pytest.mark.parametrize("way", ["flush", "release", "another optimizer", "to AdamW"])
def test_what_settles_rows_inside_flushed_settles_them_for_good(way):
    (model, optimizer), (twin, adamw) = twins()
    parameters = [model.emb.weight]
    with optimizer.flushed():
        if way == "flush":
            optimizer.flush()
        elif way == "another optimizer":
            optimizer = LazyAdamW(parameters, embeddings=[model.emb], **OPTIONS)
            adamw = torch.optim.AdamW([twin.emb.weight], foreach=False, **OPTIONS)
        else:
            state = to_adamw_state(optimizer)
            optimizer.release()
    assert torch.equal(stored(model.emb.weight), now(model))
    assert error(now(model), now(twin)) <= RIGHT[torch.float32]
    if way == "to AdamW":
        optimizer = torch.optim.AdamW(parameters, foreach=False, **OPTIONS)
        optimizer.load_state_dict(state)
    if way != "release":
        train(model, optimizer, range(20, 26))
        train(twin, adamw, range(20, 26))
    assert error(now(model), now(twin)) <= RIGHT[torch.float32]


def test_a_table_in_another_layout():
    pairs = []
    for kind in ("lazy", "dense"):
        torch.manual_seed(0)
        model = Model()
        model.emb.weight = nn.Parameter(torch.randn(WIDTH, ROWS).t())
        parameters = [model.emb.weight]
        if kind == "lazy":
            optimizer = LazyAdamW(parameters, embeddings=[model.emb], **OPTIONS)
        else:
            optimizer = torch.optim.AdamW(parameters, foreach=False, **OPTIONS)
        train(model, optimizer, range(20))
        weight = model.emb.weight
        seen = [weight.T.view(-1) * 1, weight.detach().as_strided((3, 3), (2, 1)).clone()]
        with torch.no_grad():
            weight.T.view(-1)[:30] = 2
        train(model, optimizer, range(20, 24))
        pairs.append([*seen, now(model)])
    for ours, theirs in zip(*pairs, strict=True):
        assert error(ours, theirs) <= RIGHT[torch.float32]


@pytest.mark.parametrize("steps", [0, 20])
def test_a_number_of_the_weight_is_formatted(steps):
    torch.manual_seed(0)
    model = Model()
    optimizer = LazyAdamW([model.emb.weight], embeddings=[model.emb], **OPTIONS)
    train(model, optimizer, range(steps))
    assert f"{model.emb.weight[30, 2]:.3f}" == f"{now(model)[30, 2]:.3f}"


def test_a_view_follows_the_weight():
    """As a view of any parameter does: the values that it shows are those of the moment."""
    pairs = twins(steps=3)
    views = []
    for model, optimizer in pairs:
        weight = model.emb.weight
        views.append([weight.data, weight.detach()[20:], model.state_dict()["emb.weight"]])
        train(model, optimizer, range(20, 30))
    for ours, theirs in zip(*views):
        assert error(ours * 1, theirs) <= RIGHT[torch.float32]


# What cannot be seen to the end raises


def test_memory_written_through_an_alias_made_before_the_optimizer():
    torch.manual_seed(0)
    model = Model()
    alias = model.emb.weight.detach()
    optimizer = LazyAdamW([model.emb.weight], embeddings=[model.emb])
    alias[5] = 1.0  # nothing lags yet, so this is a write like any other
    assert torch.equal(model.emb(torch.tensor([5]))[0], alias[5])
    train(model, optimizer, range(3))
    alias[5] = 1.0
    for look in (lambda: model(EVERY), model.state_dict, lambda: model.emb.weight.norm()):
        with pytest.raises(UserError, match="through another tensor"):
            look()
    with pytest.raises(UserError, match="through another tensor"):
        train(model, optimizer, [3])


def test_the_memory_itself_is_warned_of_once():
    (model, optimizer), _ = twins()
    with pytest.warns(UserWarning, match=r"optimizer\.flushed\(\)"):
        model.emb.weight.data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.emb.weight.data_ptr()
        model.state_dict()["emb.weight"].data_ptr()
        model.emb.weight.untyped_storage().data_ptr()  # it tells who shares memory
    with optimizer.flushed(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.emb.weight.data_ptr()


def test_a_write_to_what_numpy_was_given_raises():
    (model, _), _ = twins()
    array = model.emb.weight.detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[3] = 1


def test_an_operation_that_writes_to_what_it_reads_raises():
    (model, _), _ = twins()
    with pytest.raises(UserError, match="flush"):
        F.embedding(EVERY, model.emb.weight.detach(), max_norm=0.1)


@pytest.mark.parametrize("data", [torch.zeros(ROWS + 1, WIDTH), torch.zeros(ROWS, WIDTH).half()])
def test_data_of_another_kind_is_refused(data):
    (model, _), _ = twins()
    with pytest.raises(UserError, match=r"optimizer\.release"):
        model.emb.weight.data = data


@DTYPES
@pytest.mark.parametrize("ids", [[-1, 2], [ROWS]])
def test_an_id_that_the_table_does_not_have(ids, dtype):
    (model, _), _ = twins(dtype)
    with pytest.raises(IndexError, match="ids from"):
        model.emb(torch.tensor(ids))
    with pytest.raises(IndexError), torch.no_grad():
        model.emb(torch.tensor(ids))


def test_a_replica_of_data_parallel_is_refused():
    (model, _), _ = twins()
    replica = model.emb._replicate_for_data_parallel()
    replica._parameters["weight"] = model.emb.weight.detach().clone()  # as a broadcast makes it
    with pytest.raises(UserError, match="DistributedDataParallel"):
        replica(EVERY)


# More than one


@pytest.mark.parametrize("lag", [False, True])
def test_two_registered_embeddings_over_one_weight(lag):
    """They have one table."""
    results = []
    for kind in ("lazy", "dense"):
        torch.manual_seed(0)
        first, second = nn.Embedding(ROWS, WIDTH), nn.Embedding(ROWS, WIDTH)
        second.weight = first.weight
        if kind == "lazy":
            optimizer = LazyAdamW([first.weight], embeddings=[first, second], **OPTIONS)
        else:
            optimizer = torch.optim.AdamW([first.weight], foreach=False, **OPTIONS)
        for step in range(30):
            optimizer.zero_grad()
            (first(batch(step)).sin() * second(batch(step + 1)).cos()).sum().backward()
            if lag:
                first(EVERY), second.weight.norm()
            optimizer.step()
        results.append((first(EVERY), second(EVERY)))
        if kind == "lazy":
            optimizer.release()
            assert type(first.weight) is nn.Parameter
    for ours, theirs in zip(*results):
        assert error(ours, theirs) <= RIGHT[torch.float32]


def test_a_second_optimizer_over_another_module_of_the_weight():
    (model, optimizer), (twin, _) = twins()
    other = shared(model)
    second = LazyAdamW([other.weight], embeddings=[other], **OPTIONS)
    assert error(now(model), now(twin)) <= RIGHT[torch.float32]
    second.zero_grad()
    other(batch(1)).sum().backward()
    with pytest.raises(UserError, match="another optimizer"):
        optimizer.step()
    second.step()
    assert torch.equal(now(model), other(EVERY).detach())


def test_a_table_is_freed_with_its_model():
    (model, optimizer), _ = twins()
    model.emb.weight.norm(), model.state_dict()
    import weakref

    table = weakref.ref(model.emb.row_table)
    del model, optimizer, _
    gc.collect()
    assert table() is None


# Threads


@DTYPES
def test_lookups_of_several_threads(dtype):
    torch.manual_seed(0)
    module = nn.Embedding(5000, 64, dtype=dtype)
    optimizer = LazyAdamW(module.parameters(), lr=1e-3, embeddings=[module])
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randint(5000, (2000,))).float().square().sum().backward()
        optimizer.step()
    right, wrong = module.state_dict()["weight"], []

    def look(seed):
        generator = torch.Generator().manual_seed(seed)
        for turn in range(10):
            ids = torch.randint(5000, (2000,), generator=generator)
            with torch.set_grad_enabled(turn % 2 == 0):
                if not torch.equal(module(ids).detach(), right[ids]):
                    wrong.append(seed)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_step_beside_lookups_of_other_threads():
    """Each lookup gives rows of one moment, and the run is as if nobody had looked."""
    (model, optimizer), _ = twins()
    (quiet, its_optimizer), _ = twins()
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            with torch.no_grad():
                seen.append(model.emb(EVERY))

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    moments = [now(model)]
    for step in range(20, 60):
        train(model, optimizer, [step])
        moments.append(now(model))
    stop.set()
    for thread in threads:
        thread.join()
    train(quiet, its_optimizer, range(20, 60))
    assert torch.equal(stored(model.emb.weight), stored(quiet.emb.weight))
    assert len(seen) > 0
    assert all(any(torch.equal(rows, moment) for moment in moments) for rows in seen)
