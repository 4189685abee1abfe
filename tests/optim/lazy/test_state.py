"""State, saving and resuming of LazyAdamW, and what may go wrong while rows are deferred."""

import collections
import copy
import io
import pickle

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim import adapt_state, from_adamw_state, to_adamw_state
from finetune.optim.lazy.adamw import LazyAdamW
from finetune.optim.lazy.table import stored

ROWS, WIDTH = 50, 8
RULES = {"rule_masses", "rule_shifts", "window_masses", "window_nodes"}
KEYS = {  # of a table's entry in a state dict: checkpoints on disk have them
    torch.float32: RULES
    | {"step", "rows", "last_step", "exp_avg", "exp_avg_sq", "lr", "weight_decay", "betas", "eps"}
    | {"witness_rows", "witness", "mixed_witness"}
}
KEYS[torch.bfloat16] = KEYS[torch.float32] | {"master"}


class Model(nn.Module):
    def __init__(self, dtype=torch.float32, rows=ROWS):
        super().__init__()
        self.embed = nn.Embedding(rows, WIDTH, padding_idx=3, dtype=dtype)
        self.head = nn.Linear(WIDTH, 4, dtype=dtype)

    def forward(self, ids):
        return self.head(self.embed(ids).sin()).square().sum()


def build(kind="exact", dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = Model(dtype)
    options = {"lr": 0.01, "weight_decay": 0.1, **options}
    if kind == "dense":
        return model, torch.optim.AdamW(model.parameters(), foreach=False, **options)
    return model, LazyAdamW(
        model.parameters(), embeddings=[model.embed], missed_steps=kind, **options
    )


def batch(step):
    return torch.randint(ROWS, (3, 2), generator=torch.Generator().manual_seed(step))


def run(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()


def assert_same_bits(model, other):
    for (name, ours), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def assert_close(model, other, atol=1e-5):
    for (name, ours), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=name)


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted():
    model, optimizer = build()
    run(model, optimizer, range(40))
    return model


@pytest.mark.parametrize("kind", ["exact", "replay", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deferred_pair_resumes_bit_by_bit(kind, dtype):
    model, optimizer = build(kind, dtype)
    run(model, optimizer, range(20))
    with optimizer.deferred():
        weights, state = through_file(model.state_dict()), through_file(optimizer.state_dict())
    run(model, optimizer, range(20, 40))
    for order in ("model first", "optimizer first"):
        other, resumed = build(kind, dtype, seed=1)
        if order == "model first":
            other.load_state_dict(weights)
        resumed.load_state_dict(
            copy.deepcopy(state)
        )  # torch takes over the tensors that it is given
        if order == "optimizer first":
            other.load_state_dict(weights)
        run(other, resumed, range(20, 40))
        assert_same_bits(other, model)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_the_plain_pair_of_state_dicts_resumes_on_the_trajectory(uninterrupted, order):
    model, optimizer = build()
    run(model, optimizer, range(20))
    weights, state = through_file(model.state_dict()), through_file(optimizer.state_dict())
    other, resumed = build(seed=1)
    for part in ("model", "optimizer") if order == "model first" else ("optimizer", "model"):
        (other if part == "model" else resumed).load_state_dict(
            weights if part == "model" else state
        )
    run(other, resumed, range(20, 40))
    assert_close(other, uninterrupted)


@pytest.mark.parametrize("loaded", ["inside", "outside"])
@pytest.mark.parametrize("deferred", ["model", "optimizer"])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_mixed_pair_is_refused(order, deferred, loaded):
    model, optimizer = build()
    run(model, optimizer, range(20))
    with optimizer.deferred() if deferred == "model" else torch.no_grad():
        weights = copy.deepcopy(model.state_dict())
    with optimizer.deferred() if deferred == "optimizer" else torch.no_grad():
        state = optimizer.state_dict()
    other, resumed = build(seed=1)
    with resumed.deferred() if loaded == "inside" else torch.no_grad():
        if order == "model first":
            other.load_state_dict(weights)
        resumed.load_state_dict(state)
        if order == "optimizer first":
            other.load_state_dict(weights)
    with pytest.raises(UserError, match="deferred"):
        other(batch(0))


def in_half(tree):
    if isinstance(tree, dict):
        return {key: in_half(value) for key, value in tree.items()}
    floats = isinstance(tree, torch.Tensor) and tree.is_floating_point()
    return tree.half() if floats else tree


CHANGED = {  # weights and state of a pair that goes on with other rows than it was saved with
    "weights in half precision": (in_half, lambda state: state, 1e-3),
    "state in half precision": (lambda weights: weights, in_half, 2e-2),
    "an average": (lambda weights: {n: 0.9 * w for n, w in weights.items()}, lambda s: s, 1e-5),
    "a row that long missed": (
        lambda weights: {
            n: w.clone().index_fill_(0, torch.tensor([0]), 0.5) for n, w in weights.items()
        },
        lambda state: state,
        1e-5,
    ),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("order", ["model first", "optimizer first", "optimizer alone"])
def test_a_state_goes_on_with_any_rows_as_of_now(order, name):
    change_weights, change_state, atol = CHANGED[name]
    pairs = [build(), build("dense")]
    for number, (model, optimizer) in enumerate(pairs):
        run(model, optimizer, range(20))
        weights, state = change_weights(through_file(model.state_dict())), optimizer.state_dict()
        state = {**state, "state": change_state(through_file(state["state"]))}
        if order == "optimizer alone":
            run(model, optimizer, range(20, 25))
        else:
            model, optimizer = build("dense" if number else "exact", seed=1)
        if order == "model first":
            model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        if order == "optimizer first":
            model.load_state_dict(weights)
        run(model, optimizer, range(20, 40))
        pairs[number] = model, optimizer
    assert_close(pairs[0][0], pairs[1][0], atol=atol)


@pytest.mark.parametrize("deferred", [True, False])
def test_a_row_that_is_no_number_is_known_again(deferred):
    model, optimizer = build()
    (model.embed(torch.tensor([7])) * float("nan")).sum().backward()
    optimizer.step()
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.arange(3)).backward()
        optimizer.step()
    for entry in optimizer.state.values():  # as if they had been away for a while
        entry.update({key: value.clone() for key, value in entry.items()})
    with optimizer.deferred() if deferred else torch.no_grad():
        weights, state = through_file(model.state_dict()), through_file(optimizer.state_dict())
    other, resumed = build(seed=1)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for pair in ((model, optimizer), (other, resumed)):
        pair[1].zero_grad()
        pair[0](torch.arange(3)).backward()
        pair[1].step()
    torch.testing.assert_close(other.embed.weight, model.embed.weight, equal_nan=True)


def test_going_back_to_a_checkpoint_in_the_same_process(uninterrupted):
    model, optimizer = build()
    run(model, optimizer, range(20))
    with optimizer.deferred():
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, range(100, 115))
    with optimizer.deferred():
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    run(model, optimizer, range(20, 40))
    assert_same_bits(model, uninterrupted)


def test_a_round_trip_in_mid_run_stays_on_the_trajectory(uninterrupted):
    model, optimizer = build()
    run(model, optimizer, range(20))
    optimizer.load_state_dict(optimizer.state_dict())
    run(model, optimizer, range(20, 30))
    with optimizer.deferred():
        optimizer.load_state_dict(optimizer.state_dict())
    run(model, optimizer, range(30, 40))
    assert_close(model, uninterrupted)


def test_weights_loaded_in_mid_run_are_rows_as_of_now():
    models = [build(), build("dense")]
    for model, optimizer in models:
        run(model, optimizer, range(10))
        other, _ = build(seed=5)
        model.load_state_dict(other.state_dict())
        run(model, optimizer, range(10, 30))
    assert_close(models[0][0], models[1][0])


def test_flush_and_flushed(uninterrupted):
    model, optimizer = build()
    run(model, optimizer, range(20))
    before, now = stored(model.embed.weight).clone(), model.state_dict()["embed.weight"]
    assert not torch.equal(before, now)
    assert torch.equal(model.embed.weight, now)
    with optimizer.flushed():
        assert torch.equal(stored(model.embed.weight), now)
        average = torch.optim.swa_utils.AveragedModel(model)
    assert torch.equal(average.module.embed(batch(0)), now[batch(0)])
    assert torch.equal(stored(model.embed.weight), before)
    optimizer.flush()
    assert torch.equal(stored(model.embed.weight), now)
    run(model, optimizer, range(20, 40))
    assert_close(model, uninterrupted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pair_of_state_dicts_from_inside_flushed_shows_rows_as_of_now(dtype):
    model, optimizer = build(dtype=dtype)
    run(model, optimizer, range(20))
    outside = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with optimizer.flushed():
        inside = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert inside[1]["state"][0].keys() == KEYS[dtype] - RULES
    torch.testing.assert_close(inside[1]["state"][0], outside[1]["state"][0], rtol=0, atol=0)
    assert torch.equal(outside[0]["embed.weight"], inside[0]["embed.weight"])
    other, resumed = build(dtype=dtype, seed=1)
    other.load_state_dict(inside[0])
    resumed.load_state_dict(inside[1])
    assert torch.equal(other.embed(torch.arange(ROWS)), model.embed(torch.arange(ROWS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deferred_state_keeps_its_keys_on_disk(dtype):
    model, optimizer = build(dtype=dtype)
    run(model, optimizer, range(5))
    with optimizer.deferred():
        state = through_file(optimizer.state_dict())["state"][0]
    assert state.keys() == KEYS[dtype]


def test_showing_is_as_before_when_a_block_ends():
    model, optimizer = build()
    run(model, optimizer, range(20))
    with optimizer.deferred():
        stored = optimizer.state_dict()["state"][0]["last_step"]
        with optimizer.deferred(), optimizer.flushed(), optimizer.flushed():
            assert optimizer.state_dict()["state"][0]["last_step"].unique().tolist() == [20]
        assert torch.equal(optimizer.state_dict()["state"][0]["last_step"], stored)
    assert optimizer.state_dict()["state"][0]["last_step"].unique().tolist() == [20]


def test_flushed_has_no_stored_rows_to_show_and_loads_no_state():
    model, optimizer = build()
    run(model, optimizer, range(3))
    with optimizer.flushed():
        with pytest.raises(UserError, match="Leave `flushed"), optimizer.deferred():
            pass
        with pytest.raises(UserError, match="Load it outside"):
            optimizer.load_state_dict(optimizer.state_dict())


def test_no_step_while_flushed():
    model, optimizer = build()
    run(model, optimizer, range(3))
    with optimizer.flushed():
        model(batch(0)).backward()
        with pytest.raises(UserError, match="flushed"):
            optimizer.step()


def test_copies_and_pickles_go_their_own_way(uninterrupted):
    model, optimizer = build()
    run(model, optimizer, range(20))
    for copied in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        run(*copied, range(20, 40))
        assert_same_bits(copied[0], uninterrupted)
        assert type(copied[0].embed) is type(model.embed)
    snapshot = copy.deepcopy(model)
    before = snapshot.state_dict()["embed.weight"].clone()
    run(model, optimizer, range(20, 40))
    assert_same_bits(model, uninterrupted)
    assert torch.equal(snapshot.state_dict()["embed.weight"], before)


def test_integers_survive_bfloat16_parameters():
    module = nn.Embedding(70_010, 2, dtype=torch.bfloat16)
    optimizer = LazyAdamW(module.parameters(), embeddings=[module])
    for _ in range(260):
        optimizer.zero_grad()
        module(torch.tensor([70_001])).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    module(torch.tensor([257])).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    state = optimizer.state_dict()["state"][0]
    assert state["rows"].tolist() == [70_001, 257]
    assert int(state["step"]) == 261
    assert state["exp_avg"].dtype == state["master"].dtype == torch.float32


def test_state_follows_rows_ever_touched():
    module = nn.Embedding(100_000, 4)
    optimizer = LazyAdamW(module.parameters(), embeddings=[module])
    for step in range(20):
        optimizer.zero_grad()
        module(torch.arange(step * 5, step * 5 + 10)).sum().backward()
        optimizer.step()
    touched = 105
    assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (touched, 4)
    assert touched < len(optimizer.state[module.weight]["exp_avg"]) <= 2 * touched + 2


def test_accelerate_prepares_it():
    from accelerate import Accelerator

    model, optimizer = build()
    accelerator = Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    run(prepared, wrapped, range(10))
    plain, plain_optimizer = build()
    run(plain, plain_optimizer, range(10))
    assert_same_bits(accelerator.unwrap_model(prepared), plain)
    accelerator.free_memory()


def test_a_replaced_parameter_is_noticed():
    model, optimizer = build()
    run(model, optimizer, range(2))
    optimizer.param_groups[0]["params"] = [
        nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]
    ]
    with pytest.raises(UserError, match="no longer among"):
        optimizer.step()


def test_a_dense_gradient_at_a_table_is_refused():
    model, optimizer = build()
    run(model, optimizer, range(2))
    optimizer.zero_grad()
    model.embed.weight.square().sum().backward()
    with pytest.raises(UserError, match="dense gradient"):
        optimizer.step()


def test_a_second_optimizer_takes_over_and_the_first_says_so():
    model, optimizer = build()
    run(model, optimizer, range(10))
    now = model.state_dict()["embed.weight"]
    LazyAdamW(model.parameters(), embeddings=[model.embed])
    assert torch.equal(model.embed.weight, now)
    with pytest.raises(UserError, match="another optimizer"):
        optimizer.step()


def test_a_second_optimizer_takes_over_every_module_of_a_weight():
    modules = nn.ModuleList(nn.Embedding(ROWS, WIDTH) for _ in range(2))
    modules[1].weight = modules[0].weight
    for _ in range(2):
        optimizer = LazyAdamW(modules.parameters(), embeddings=modules)
        for step in range(3):
            optimizer.zero_grad()
            (modules[0](batch(step)) + modules[1](batch(step + 1))).square().sum().backward()
            optimizer.step()
    now = modules[0].weight.detach().clone()
    copied = copy.deepcopy(modules)
    optimizer.release()
    for module in (*modules, *copied):
        assert type(module) is nn.Embedding
        assert not module.sparse
        assert torch.equal(module(torch.arange(ROWS)), now)


def test_release_gives_the_plain_embedding_back():
    model, optimizer = build()
    run(model, optimizer, range(10))
    now = model.state_dict()["embed.weight"]
    optimizer.release()
    assert type(model.embed) is nn.Embedding
    assert torch.equal(model.embed.weight, now)
    model(batch(0)).backward()
    assert not model.embed.weight.grad.is_sparse


def test_changed_options_hold_from_the_step_they_are_changed_at():
    models = [build(dtype=torch.float64), build("dense", torch.float64)]
    for model, optimizer in models:
        group = optimizer.param_groups[0]
        run(model, optimizer, range(10))
        group["weight_decay"] = 0.5
        run(model, optimizer, range(10, 20))
        group["betas"], group["eps"] = (0.8, 0.99), 1e-5
        run(model, optimizer, range(20, 30))
        group["lr"] = torch.tensor(0.003, dtype=torch.float64)
        run(model, optimizer, range(30, 50))
    assert_close(models[0][0], models[1][0], atol=1e-9)


def test_an_unused_embedding_is_not_stepped_and_an_empty_gradient_is_a_step():
    models = [build(dtype=torch.float64), build("dense", torch.float64)]
    for model, optimizer in models:
        run(model, optimizer, range(5))
        for _ in range(5):  # not used: grad is None
            optimizer.zero_grad()
            model.head(torch.ones(1, WIDTH, dtype=torch.float64)).sum().backward()
            optimizer.step()
        for _ in range(5):  # used, with no ids
            optimizer.zero_grad()
            (
                model.head(torch.ones(1, WIDTH, dtype=torch.float64)).sum()
                + model(torch.empty(0, dtype=torch.long))
            ).backward()
            optimizer.step()
        run(model, optimizer, range(5, 10))
    assert_close(models[0][0], models[1][0], atol=1e-10)
    steps = [int(model_optimizer[1].state_dict()["state"][0]["step"]) for model_optimizer in models]
    assert steps == [15, 15]


def test_accumulated_gradients_closures_groups_and_a_table_added_later():
    results = []
    for kind in ("lazy", "dense"):
        torch.manual_seed(0)
        tables = [nn.Embedding(20, 4, dtype=torch.float64) for _ in range(3)]
        groups = [
            {"params": [tables[0].weight], "lr": 0.1},
            {"params": [tables[1].weight], "weight_decay": 0.0},
        ]
        if kind == "lazy":
            optimizer = LazyAdamW(groups, lr=0.01, embeddings=tables[:2])
        else:
            optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
        for step in range(20):
            if step == 10:
                added = {"params": [tables[2].weight], "lr": 0.05}
                optimizer.add_param_group(
                    {**added, "embeddings": [tables[2]]} if kind == "lazy" else added
                )

            def closure(step=step, optimizer=optimizer, tables=tables):
                optimizer.zero_grad()
                loss = torch.zeros(())
                for micro_batch in range(3):
                    ids = torch.randint(
                        20, (4,), generator=torch.Generator().manual_seed(10 * step + micro_batch)
                    )
                    loss = sum(table(ids).sin().sum() for table in tables[: 2 if step < 10 else 3])
                    loss.backward()
                return loss

            assert optimizer.step(closure) is not None
            scheduler.step() if step < 9 else None
        results.append([table.state_dict()["weight"] for table in tables])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_step_that_the_scaler_skips_is_no_step():
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    for step in range(10):
        optimizer.zero_grad()
        loss = model(batch(step)) * (float("inf") if step == 4 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert int(optimizer.state_dict()["state"][0]["step"]) == 9
    plain, plain_optimizer = build()
    run(plain, plain_optimizer, [step for step in range(10) if step != 4])
    assert_close(model, plain)


def test_hooks_run_once_a_step():
    model, optimizer = build()
    torch.optim.AdamW(model.parameters())  # torch patches the step of a class at its first instance
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2


def test_bfloat16_weights_decay_as_their_float32_masters():
    """Without masters nothing would ever decay.

    lr * weight_decay is far below half a unit in the last place of bfloat16.
    """
    start, results = torch.randn(6, 4).bfloat16(), {}
    for dtype in (torch.float32, torch.bfloat16):
        module = nn.Embedding(6, 4, dtype=dtype)
        module.weight.data.copy_(start)
        optimizer = LazyAdamW(module.parameters(), lr=3e-3, weight_decay=0.1, embeddings=[module])
        for step in range(150):
            optimizer.zero_grad()
            (module(torch.tensor([step % 2, 2 + step % 3])).float().mean() * 0).backward()
            optimizer.step()
        results[dtype] = module.state_dict()["weight"].float()
    assert (results[torch.float32].abs() < 0.97 * start.abs()).all()
    torch.testing.assert_close(results[torch.bfloat16], results[torch.float32], rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (lambda: nn.Embedding(4, 2, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(4, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: nn.Embedding(4, 2, dtype=torch.complex64), "complex"),
        (lambda: nn.Embedding.from_pretrained(torch.zeros(4, 2)), "frozen"),
    ],
)
def test_what_cannot_be_lazy_says_so(embedding, message):
    module = embedding()
    with pytest.raises(UserError, match=message):
        LazyAdamW([module.weight], embeddings=[module])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.99, 0.9)}, "replay"),
        ({"eps": -1e-8}, "eps"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"missed_steps": "exat"}, "Did you mean 'exact'"),
    ],
)
def test_options_out_of_range_say_so(options, message):
    module = nn.Embedding(4, 2)
    with pytest.raises(UserError, match=message):
        LazyAdamW(module.parameters(), embeddings=[module], **options)


def test_more_that_says_so():
    module, other = nn.Embedding(4, 2), nn.Embedding(4, 2)
    with pytest.raises(UserError, match="among"):
        LazyAdamW(module.parameters(), embeddings=[other])
    optimizer = LazyAdamW(module.parameters(), lr=1.0, weight_decay=1.0, embeddings=[module])
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="below 1"):
        optimizer.step()
    sparse = nn.Embedding(4, 2, sparse=True)
    optimizer = LazyAdamW(sparse.parameters())
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="embeddings"):
        optimizer.step()
    module, optimizer = build()
    run(module, optimizer, range(2))
    with pytest.raises(UserError, match="in mid-run"):
        module.to(torch.float64)


def test_the_lookup_sits_below_a_subclass():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    module = Gemma3TextScaledWordEmbedding(20, 4, padding_idx=0, embed_scale=2.0)
    twin = copy.deepcopy(module)
    optimizer = LazyAdamW(module.parameters(), lr=0.1, embeddings=[module])
    dense = torch.optim.AdamW(twin.parameters(), lr=0.1, foreach=False)
    assert isinstance(module, Gemma3TextScaledWordEmbedding)
    for step in range(20):
        ids = torch.randint(20, (2, 3), generator=torch.Generator().manual_seed(step))
        for embedding, stepper in ((module, optimizer), (twin, dense)):
            stepper.zero_grad()
            embedding(ids).sin().sum().backward()
            stepper.step()
    every = torch.arange(20)
    torch.testing.assert_close(module(every), twin(every), rtol=0, atol=1e-5)
    assert torch.equal(module(every), 2 * module.state_dict()["weight"])
    assert list(module.state_dict()) == list(twin.state_dict())


def test_the_padding_row_gets_no_gradient_but_decays():
    model, optimizer = build()
    model.embed.weight.data[3] = 1.0
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.tensor([3, 4, 4])).backward()
        assert model.embed.weight.grad.coalesce().indices().tolist() == [[4]]
        optimizer.step()
    torch.testing.assert_close(
        model.state_dict()["embed.weight"][3], torch.full((WIDTH,), (1 - 0.001) ** 5)
    )


def test_a_read_in_inference_mode_leaves_nothing_behind_that_training_trips_over() -> None:
    embedding = nn.Embedding(20, 4)
    optimizer = LazyAdamW(embedding.parameters(), lr=0.1, embeddings=[embedding])
    for ids in ([1, 2], [3], [1], [2, 3]):
        embedding(torch.tensor(ids)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            embedding(torch.arange(20))
    assert embedding(torch.arange(20)).isfinite().all()


def test_gradients_of_lookups_arrive_coalesced():
    """Once rows lag behind. To sum repeated rows, a step on a GPU would have to wait for it."""
    module = nn.Embedding(50, 4)
    optimizer = LazyAdamW(module.parameters(), embeddings=[module])
    module(torch.tensor([3, 1, 3])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for used in ([1, 3], [1, 3, 7]):
        module(torch.tensor([7, 3, 3] if len(used) == 3 else [3, 1, 3])).sum().backward()
        assert module.weight.grad.is_coalesced()
        assert module.weight.grad.indices().tolist() == [used]
    assert module.weight.grad.values()[:, 0].tolist() == [1.0, 4.0, 1.0]


def test_what_was_skipped_stays_skipped_under_another_rule():
    """Rows that were to stay as they were do not make up the steps of before."""
    model, optimizer = build("skip")
    run(model, optimizer, range(6))
    with optimizer.deferred():
        saved = through_file([model.state_dict(), optimizer.state_dict()])
    weights = model.embed.weight.detach().clone()
    for kind in ("exact", "replay"):
        again, other = build(kind)
        with other.deferred():
            again.load_state_dict(saved[0])
            other.load_state_dict(saved[1])
        assert torch.equal(again.state_dict()["embed.weight"], weights)
    plain, _ = build("skip")
    plain.load_state_dict(saved[0])
    adapt_state(torch.optim.AdamW(plain.parameters()), saved[1])
    assert torch.equal(plain.embed.weight, weights)


def test_steps_that_are_to_be_made_up_are_not_skipped():
    model, optimizer = build("exact")
    run(model, optimizer, range(6))
    with optimizer.deferred():
        saved = through_file([model.state_dict(), optimizer.state_dict()])
    again, other = build("skip")
    with other.deferred():
        again.load_state_dict(saved[0])
        with pytest.raises(UserError, match="still to make up steps"):
            other.load_state_dict(saved[1])
    again, other = build("skip")
    again.load_state_dict(model.state_dict())  # rows as of now have nothing to make up
    other.load_state_dict(optimizer.state_dict())
    run(again, other, range(6, 8))


# A table's state goes to a table, and to no other parameter


@pytest.mark.parametrize("ids", [[0], [5, 4, 3, 2, 1, 0]], ids=["some rows", "every row"])
@pytest.mark.parametrize("left_out", ["both", "second"])
def test_the_state_of_a_table_is_refused_by_a_parameter_that_is_none(ids, left_out):
    tables = [nn.Embedding(6, 16) for _ in range(2)]
    params = [(f"table.{number}", table.weight) for number, table in enumerate(tables)]
    optimizer = LazyAdamW(params, lr=0.05, embeddings=tables)
    for one in ids:
        optimizer.zero_grad()
        sum(table(torch.tensor([one])).sin().sum() for table in tables).backward()
        optimizer.step()
    weights, saved = copy.deepcopy([t.state_dict() for t in tables]), optimizer.state_dict()
    others = [nn.Embedding(6, 16) for _ in range(2)]
    named = [(f"table.{number}", table.weight) for number, table in enumerate(others)]
    lazy = others[:1] if left_out == "second" else []
    resumed = LazyAdamW(named, lr=0.05, embeddings=lazy)
    with pytest.raises(UserError, match=f"'table.{len(lazy)}'.*adapt_state"):
        resumed.load_state_dict(saved)
    for table, weight in zip(others, weights, strict=True):
        table.load_state_dict(weight)
    resumed.load_state_dict(adapt_state(resumed, saved))
    for own, stepper in ((tables, optimizer), (others, resumed)):
        stepper.zero_grad()
        sum(table(torch.arange(6)).sin().sum() for table in own).backward()
        stepper.step()
    for ours, theirs in zip(tables, others, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("size", [(10, WIDTH), (ROWS, WIDTH + 2)])
def test_the_state_of_a_table_of_another_size_is_refused(size):
    model, optimizer = build()
    run(model, optimizer, range(10))
    table = nn.Embedding(*size)
    other = LazyAdamW([*table.parameters(), *model.head.parameters()], embeddings=[table])
    state = optimizer.state_dict()
    with pytest.raises(UserError, match="Load it into the model it was saved with"):
        other.load_state_dict(state)


def test_moments_of_another_shape_are_refused_by_a_dense_parameter():
    weight = nn.Parameter(torch.ones(6, 4))
    optimizer = LazyAdamW([weight])
    state = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 4), "exp_avg_sq": torch.ones(2, 4)}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    weight.grad = torch.ones(6, 4)
    with pytest.raises(UserError, match=r"moments of \[2, 4\]"):
        optimizer.step()


@pytest.mark.parametrize("part", ["weight", "gradient", "moments"])
def test_a_dense_parameter_in_another_layout(part):
    results = []
    for kind in ("lazy", "dense"):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3)
        if part == "moments":  # are laid out as the weight is when they are made
            layer.to(memory_format=torch.channels_last)
        cls = LazyAdamW if kind == "lazy" else torch.optim.AdamW
        optimizer = cls([layer.weight], lr=0.01)
        for step in range(4):
            if step == 2 and part != "gradient":
                formats = {"weight": torch.channels_last, "moments": torch.contiguous_format}
                layer.to(memory_format=formats[part])
            loss = layer(torch.ones(1, 3, 6, 6)).sin().sum()
            (grad,) = torch.autograd.grad(loss, [layer.weight])
            if part == "gradient":
                grad = grad.contiguous(memory_format=torch.channels_last)
            layer.weight.grad = grad
            optimizer.step()
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


# Loading in either order, by any way


LOADS = {
    "load_state_dict": lambda model, weights: model.load_state_dict(weights),
    "copy_": lambda model, weights: [p.copy_(weights[n]) for n, p in model.named_parameters()],
    "data": lambda model, weights: [
        setattr(p, "data", weights[n].to(p.dtype)) for n, p in model.named_parameters()
    ],
    "rows in two parts": lambda model, weights: [
        part.copy_(value)
        for n, p in model.named_parameters()
        for part, value in zip(p.chunk(2), weights[n].chunk(2), strict=True)
    ],
}


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("way", LOADS)
def test_a_step_of_lr_0_leaves_what_was_loaded(way, order, dtype, saved_as):
    model, optimizer = build(dtype=saved_as)
    run(model, optimizer, range(20))
    weights, state = through_file((model.state_dict(), optimizer.state_dict()))
    other, resumed = build(dtype=dtype, seed=1)
    for part in ("model", "optimizer") if order == "model first" else ("optimizer", "model"):
        if part == "optimizer":
            resumed.load_state_dict(copy.deepcopy(state))
        else:
            with torch.no_grad():
                LOADS[way](other, weights)
    resumed.param_groups[0]["lr"] = 0.0
    run(other, resumed, range(20, 22))
    for name, weight in weights.items():
        assert torch.equal(other.state_dict()[name], weight.to(dtype)), name


def test_a_weight_that_rows_which_lag_do_not_belong_to_is_refused_however_it_is_written():
    model, optimizer = build()
    run(model, optimizer, range(20))
    with optimizer.deferred():
        state = optimizer.state_dict()
    other, resumed = build(seed=1)
    resumed.load_state_dict(state)
    with torch.no_grad():
        other.embed.weight[3:] = 1.0
    with pytest.raises(UserError, match="not the one"):
        other(batch(0))


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_going_back_to_before_the_first_step(order, deferred):
    model, optimizer = build()
    with optimizer.deferred() if deferred else torch.no_grad():
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, range(10))
    with optimizer.deferred() if deferred else torch.no_grad():
        for part in ("model", "optimizer") if order == "model first" else ("optimizer", "model"):
            (model if part == "model" else optimizer).load_state_dict(
                copy.deepcopy(weights if part == "model" else state)
            )
    for name, weight in weights.items():
        assert torch.equal(model.state_dict()[name], weight)


def test_torch_distributed_checkpoint():
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = build()
    run(model, optimizer, range(10))
    optimizer.zero_grad()
    weights, state = through_file(get_state_dict(model, optimizer))
    other, resumed = build(seed=1)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
    for pair in ((model, optimizer), (other, resumed)):
        run(*pair, range(10, 20))
    assert_close(model, other)


# A state that other code takes away or writes to


RESETS = {
    "clear": lambda optimizer: optimizer.state.clear(),
    "a new one": lambda optimizer: setattr(optimizer, "state", collections.defaultdict(dict)),
    "pop": lambda optimizer: [optimizer.state.pop(p) for p in list(optimizer.state)],
    "each entry": lambda optimizer: [entry.clear() for entry in optimizer.state.values()],
}


BETWEEN = {
    "nothing": lambda model, optimizer: None,
    "a flush": lambda model, optimizer: isinstance(optimizer, LazyAdamW) and optimizer.flush(),
    "a write": lambda model, optimizer: model.embed.weight.data.mul_(0.5),
}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("way", RESETS)
def test_a_state_that_is_cleared_begins_anew(way, between, saved):
    pairs = [build(dtype=torch.float64), build("dense", torch.float64)]
    for number, (model, optimizer) in enumerate(pairs):
        run(model, optimizer, range(10))
        RESETS[way](optimizer)
        BETWEEN[between](model, optimizer)
        if saved:
            weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model, optimizer = build("dense" if number else "exact", torch.float64, seed=1)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        run(model, optimizer, range(10, 20))
        pairs[number] = model, optimizer
    assert_close(pairs[0][0], pairs[1][0], atol=1e-9)


def reset_moments(optimizer):
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()
        entry["exp_avg_sq"].mul_(0.5)


def reset_step(optimizer):
    for entry in optimizer.state.values():
        entry["step"].zero_()


def replace_step(optimizer):
    for entry in optimizer.state.values():
        entry["step"] = torch.tensor(3.0)


def test_the_default_device_is_no_concern_of_a_table():
    models = []
    for device in ("cpu", "meta"):
        model, _ = build()
        with torch.device(device):
            options = {"lr": 0.01, "weight_decay": 0.1, "embeddings": [model.embed]}
            optimizer = LazyAdamW(model.parameters(), **options)
        for step in range(10):
            optimizer.zero_grad()
            model(batch(step)).backward()
            with torch.device(device):
                optimizer.step()
        with torch.device(device):
            state = optimizer.state_dict()
            optimizer.load_state_dict(state)
            to_adamw_state(optimizer)
        run(model, optimizer, range(10, 12))
        models.append(model)
    assert_same_bits(*models)


@pytest.mark.parametrize("way", [reset_moments, reset_step, replace_step])
def test_moments_that_are_written_to_in_place(way):
    """As ReLoRA does."""
    pairs = [build(dtype=torch.float64), build("dense", torch.float64)]
    for model, optimizer in pairs:
        run(model, optimizer, range(10))
        if isinstance(optimizer, LazyAdamW):
            optimizer.flush()
        way(optimizer)
        run(model, optimizer, range(10, 20))
    assert_close(pairs[0][0], pairs[1][0], atol=1e-9)


def test_moments_may_go_away_and_come_back():
    """As tools do that move them to another device for a while."""
    pairs = [build(dtype=torch.float64), build("dense", torch.float64)]
    for model, optimizer in pairs:
        run(model, optimizer, range(10))
        for entry in optimizer.state.values():
            entry.update({key: value.clone() for key, value in entry.items()})
        run(model, optimizer, range(10, 20))
    assert_close(pairs[0][0], pairs[1][0], atol=1e-9)


def test_a_look_at_the_state_before_the_first_step_changes_nothing():
    pairs = [build(dtype=torch.float64), build("dense", torch.float64)]
    for model, optimizer in pairs:
        if isinstance(optimizer, LazyAdamW):
            assert not optimizer.state[model.embed.weight], "which makes an empty entry"
            optimizer.state[model.embed.weight]["of somebody"] = 1
        run(model, optimizer, range(10))
    assert_close(pairs[0][0], pairs[1][0], atol=1e-9)


@pytest.mark.parametrize("state", ["of AdamW", "before the first step"])
def test_a_state_alone_in_deferred_goes_with_rows_as_of_now(state):
    model, optimizer = build(dtype=torch.float64)
    before = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(10))
    now = model.embed.weight.clone()
    with optimizer.deferred():
        if state == "of AdamW":
            dense, adamw = build("dense", torch.float64)
            run(dense, adamw, range(3))
            from_adamw_state(optimizer, adamw.state_dict())
        else:
            optimizer.load_state_dict(before)
    torch.testing.assert_close(model.embed.weight.clone(), now, rtol=0, atol=1e-12)


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("way", ["at once", "in two parts", "after a new init"])
def test_masters_keep_their_bits_whatever_is_written_before_the_weight_is_there(way, deferred):
    model, optimizer = build(dtype=torch.bfloat16)
    run(model, optimizer, range(20))
    optimizer.flush()
    with optimizer.deferred() if deferred else torch.no_grad():
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, resumed = build(dtype=torch.bfloat16, seed=1)
    with resumed.deferred() if deferred else torch.no_grad(), torch.no_grad():
        resumed.load_state_dict(state)
        if way == "after a new init":
            nn.init.normal_(other.embed.weight)
        for part in (slice(0, 20), slice(20, None)) if way == "in two parts" else (slice(None),):
            other.embed.weight[part] = weights["embed.weight"][part]
        other.head.load_state_dict(model.head.state_dict())
    run(other, resumed, range(20, 21))
    run(model, optimizer, range(20, 21))
    assert torch.equal(other.embed.row_table.master, model.embed.row_table.master)


def test_moments_that_are_written_to_while_rows_lag_or_replaced_are_refused():
    for way in (
        reset_moments,
        reset_step,
        lambda optimizer: [entry.update(exp_avg=None) for entry in optimizer.state.values()],
    ):
        model, optimizer = build()
        run(model, optimizer, range(10))
        way(optimizer)
        with pytest.raises(UserError, match="moments"):
            run(model, optimizer, [10])


def test_the_state_shows_the_arrays_in_use_whatever_moved_them():
    model, optimizer = build()
    run(model, optimizer, range(10))
    entry, table = optimizer.state[model.embed.weight], model.embed.row_table
    moves = [
        optimizer.flush,
        lambda: model.embed.weight.data.mul_(0.5),
        lambda: model.load_state_dict(model.state_dict()),
        lambda: optimizer.param_groups[0].update(betas=(0.8, 0.99)),
    ]
    for number, move in enumerate(moves):
        move()
        assert optimizer.state[model.embed.weight] is entry
        assert entry["exp_avg"] is table.exp_avg
        run(model, optimizer, range(10 + 2 * number, 12 + 2 * number))
        assert entry["exp_avg"] is table.exp_avg
        assert int(entry["step"]) == table.step_count


# The module, changed after it was registered


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq"])
@pytest.mark.parametrize("steps", [0, 10])
def test_an_option_of_the_embedding_that_is_set_later_is_refused(option, steps):
    model, optimizer = build()
    run(model, optimizer, range(steps))
    setattr(model.embed, option, 0.1)
    with pytest.raises(UserError, match=option):
        model(batch(0))
    with pytest.raises(UserError, match=option):
        optimizer.step()


@pytest.mark.parametrize("padding_idx", [-1, ROWS - 1, 0, -ROWS])
def test_a_padding_idx_that_is_set_later(padding_idx):
    pairs = [build(dtype=torch.float64), build("dense", torch.float64)]
    for model, optimizer in pairs:
        run(model, optimizer, range(10))
        model.embed.padding_idx = padding_idx
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([[0, 5, ROWS - 1]])).backward()
            optimizer.step()
    assert_close(pairs[0][0], pairs[1][0], atol=1e-9)


def test_an_embedding_that_is_named_twice_is_registered_once():
    table = nn.Embedding(6, 4)
    optimizer = LazyAdamW(table.parameters(), embeddings=[table, table])
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    optimizer.release()
    assert type(table) is nn.Embedding


def test_what_needs_no_gradient_does_not_ask_for_one():
    model, optimizer = build()
    run(model, optimizer, range(5))
    optimizer.zero_grad()
    model.embed.weight.square().sum().backward()  # dense
    optimizer.param_groups[0]["lr"] = -1.0
    with optimizer.flushed():
        pass
    optimizer.flush()
    optimizer.release()
    assert type(model.embed) is nn.Embedding


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"amsgrad": True}, "amsgrad"),
        ({"decoupled_weight_decay": False, "weight_decay": 0.1}, "of Adam"),
    ],
)
def test_a_group_of_another_rule_is_refused(group, message):
    table, layer = nn.Embedding(6, 4), nn.Linear(2, 2)
    with pytest.raises(UserError, match=message):
        LazyAdamW([{"params": table.parameters(), **group}], embeddings=[table])
    optimizer = LazyAdamW(layer.parameters())
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(group)
    with pytest.raises(UserError, match=message):
        optimizer.load_state_dict(saved)


def test_a_sparse_bag_says_what_to_do():
    bag = nn.EmbeddingBag(6, 4, sparse=True)
    with pytest.raises(UserError, match="sparse=False"):
        LazyAdamW(bag.parameters(), embeddings=[bag])
    optimizer = LazyAdamW(bag.parameters())
    bag(torch.tensor([[1]])).sum().backward()
    with pytest.raises(UserError, match="sparse=False"):
        optimizer.step()


def test_a_write_in_inference_mode_leaves_a_table_that_trains():
    pairs = [build(dtype=torch.float64), build("dense", torch.float64)]
    for model, optimizer in pairs:
        run(model, optimizer, range(10))
        with torch.inference_mode():
            model.embed.weight.mul_(0.5)
        run(model, optimizer, range(10, 20))
    assert_close(pairs[0][0], pairs[1][0], atol=1e-9)
