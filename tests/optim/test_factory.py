"""What build_optimizer decides by itself, and the rules that torch does not have."""

import logging
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from finetune.errors import UserError
from finetune.optim import build_optimizer
from finetune.optim.lazy.convert import adapt_state, from_adamw_state, to_adamw_state

# peft 0.21 reads every attribute of a transformers 5 model, a deprecated one among them
PEFT_WARNING = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def llama(*, tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SIZES))


def step(model, optimizer):
    """Take a step; return whether the input embedding's gradient was sparse, None without one."""
    ids = torch.tensor([[3, 4, 3, 5]])
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [
        m.weight.grad
        for m in model.modules()
        if isinstance(m, nn.Embedding) and m.weight.requires_grad
    ]
    sparse = {grad.is_sparse for grad in grads}
    optimizer.step()
    return sparse


# -- fused kernels --


@pytest.mark.parametrize(
    ("name", "options", "fused"),
    [
        ("adamw", {}, True),
        ("adam", {}, True),
        ("adamw", {"fused": False}, False),
        ("adamw", {"foreach": True}, None),
        ("adamw", {"capturable": True}, None),
        ("sgd", {}, None),
    ],
)
def test_fused_is_chosen_where_it_pays_unless_something_else_is_asked_for(name, options, fused):
    assert build_optimizer(nn.Linear(2, 2), name, **options).param_groups[0]["fused"] is fused


def test_fused_is_not_chosen_for_parameters_it_would_get_wrong():
    transposed = nn.Parameter(torch.ones(2, 3).t())
    assert build_optimizer([transposed], "adamw").param_groups[0]["fused"] is None


# -- row-sparse embeddings --


def test_an_untied_embedding_is_row_sparse_without_a_word(caplog):
    caplog.set_level(logging.INFO, "finetune")
    model = llama()
    assert step(model, build_optimizer(model, "lazy_adamw")) == {True}
    assert caplog.messages == []


def test_a_tied_embedding_stays_dense_and_the_user_is_told_why_and_what_helps(caplog):
    model, reference = llama(tied=True), llama(tied=True)
    optimizer, oracle = (
        build_optimizer(model, "lazy_adamw", lr=0.01),
        build_optimizer(reference, "adamw", lr=0.01),
    )
    (message,) = [record for record in caplog.records if record.name == "finetune"]
    assert message.levelno == logging.WARNING
    assert "'model.embed_tokens' shares its weight with 'lm_head'" in message.getMessage()
    assert "active vocabulary" in message.getMessage()
    for _ in range(3):
        assert step(model, optimizer) == {False}
        step(reference, oracle)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=0, atol=1e-6)


def test_a_weight_that_shares_only_its_memory_is_tied_too(caplog):
    model = llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    build_optimizer(model, "lazy_adamw")
    assert "shares its weight with 'lm_head'" in caplog.text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_norm": 1.0}, "its max_norm rewrites rows as they are read"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq does not go with row-sparse gradients"),
    ],
    ids=str,
)
def test_a_table_that_cannot_be_stepped_by_rows_is_updated_as_by_adamw(options, why, caplog):
    weights = []
    for name in ("lazy_adamw", "adamw"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 3, **options))
        optimizer = build_optimizer(model, name, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 1, 4])).square().sum().backward()
            assert not model[0].weight.grad.is_sparse
            optimizer.step()
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(f"the embedding '0' is updated densely, as by adamw: {why}")


def clip():
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text, vision = {"vocab_size": 9, **sizes}, {"image_size": 8, "patch_size": 4, **sizes}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))


def wav2vec2():
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "conv_dim": (8,),
        "conv_stride": (2,),
        "conv_kernel": (2,),
        "num_conv_pos_embedding_groups": 2,
    }
    return Wav2Vec2Model(Wav2Vec2Config(**sizes))


@pytest.mark.parametrize(("make", "tables"), [(clip, 3), (wav2vec2, 0)])
def test_a_model_that_names_no_input_embedding_has_all_its_tables_by_rows(make, tables):
    model = make()
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    assert len(build_optimizer(model, "lazy_adamw").registered_weights()) == tables


def test_the_warning_reaches_a_user_who_set_up_no_logging():
    program = """
from torch import nn
from finetune.optim import build_optimizer
from finetune.optim.lazy.convert import from_adamw_state, to_adamw_state
model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
model[1].weight = model[0].weight
build_optimizer(model, "lazy_adamw")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "lazy_adamw: the embedding '0' shares its weight with '1'" in done.stderr


@PEFT_WARNING
def test_under_lora_the_frozen_embedding_is_no_matter(caplog):
    caplog.set_level(logging.INFO, "finetune")
    model = get_peft_model(llama(tied=True), LoraConfig(target_modules=["q_proj", "v_proj"]))
    optimizer = build_optimizer(model, "lazy_adamw")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "is frozen" in record.getMessage()
    assert step(model, optimizer) == set()
    assert all("lora" in name for group in optimizer.param_groups for name in group["param_names"])


@PEFT_WARNING
def test_lora_beside_a_trainable_embedding():
    model = get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    )
    assert step(model, build_optimizer(model, "lazy_adamw")) == {True}


def test_a_scaled_embedding_equals_dense_adamw():
    models = []
    for name in ("lazy_adamw", "adamw"):
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(Gemma3TextConfig(tie_word_embeddings=False, head_dim=4, **SIZES))
        optimizer = build_optimizer(model, name, lr=0.01)
        for _ in range(3):
            assert step(model, optimizer) == {name == "lazy_adamw"}
        getattr(optimizer, "flush", lambda: None)()
        models.append(model)
    for (name, lazy), dense in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        torch.testing.assert_close(lazy, dense, rtol=0, atol=1e-6, msg=name)


def test_parameters_alone_give_no_embedding_and_a_warning(caplog):
    build_optimizer(llama().parameters(), "lazy_adamw")
    assert "lazy_adamw was given parameters, not a model" in caplog.text


def test_embeddings_given_by_hand_are_taken(caplog):
    model = llama()
    optimizer = build_optimizer(
        model.named_parameters(), "lazy_adamw", embeddings=[model.model.embed_tokens]
    )
    assert step(model, optimizer) == {True}
    assert caplog.messages == []


# -- the stamp --


def trained(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_adam_does_not_become_adamw():
    layer = nn.Linear(2, 2)
    state = trained(build_optimizer(layer, "adamw")).state_dict()
    adam = build_optimizer(layer, "adam")
    with pytest.raises(
        UserError,
        match=r"state is of adamw, but this run uses adam\. Resume with the same optimizer",
    ):
        adam.load_state_dict(state)
    assert adam.param_groups[0]["decoupled_weight_decay"] is False


@pytest.mark.parametrize(
    ("bare", "name", "fits"),
    [
        (lambda p: torch.optim.AdamW(p), "adamw", True),
        (lambda p: torch.optim.AdamW(p), "adam", False),
        (lambda p: torch.optim.AdamW(p), "sgd", False),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "momentum", True),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "sgd", False),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "nesterov", False),
    ],
)
def test_the_state_of_a_bare_torch_optimizer_is_taken_where_the_rule_is_the_same(bare, name, fits):
    parameters = [nn.Parameter(torch.ones(2))]
    state = trained(bare(parameters)).state_dict()
    optimizer = build_optimizer(parameters, name)
    if fits:
        optimizer.load_state_dict(state)
        assert [(group["optimizer"], group["name"]) for group in optimizer.param_groups] == [
            (name, "all")
        ]
        assert len(optimizer.state) == 1
    else:
        with pytest.raises(UserError, match=f"but this run uses {name}"):
            optimizer.load_state_dict(state)


def one_cycle(optimizer):
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 9)


def cyclic(optimizer):
    torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.2, cycle_momentum=False)


def by_hand(optimizer):
    optimizer.param_groups[0]["lr_scale"] = 0.5


@pytest.mark.parametrize("keys_from", [one_cycle, cyclic, by_hand])
@pytest.mark.parametrize(("name", "fits"), [("adamw", True), ("adam", False), ("lion", False)])
def test_the_keys_of_a_scheduler_do_not_make_it_another_optimizer(keys_from, name, fits):
    parameters = [nn.Parameter(torch.ones(2))]
    bare = torch.optim.AdamW(parameters)
    keys_from(bare)
    state = trained(bare).state_dict()
    optimizer = build_optimizer(parameters, name)
    if not fits:
        with pytest.raises(UserError, match=f"is of a bare .*AdamW, but this run uses {name}"):
            optimizer.load_state_dict(state)
        return
    optimizer.load_state_dict(state)
    assert set(state["param_groups"][0]) <= set(optimizer.param_groups[0])


@pytest.mark.parametrize("source", ["a bare torch.optim.AdamW", "adamw"])
@pytest.mark.parametrize("rows", [False, True])
def test_lazy_adamw_names_the_way_to_load_the_state_of_adamw(source, rows):
    layer = nn.Sequential(nn.Embedding(3, 2)) if rows else nn.Linear(2, 2)
    adamw = (
        build_optimizer(layer, source, no_decay=())
        if source == "adamw"
        else torch.optim.AdamW(layer.parameters())
    )
    state = trained(adamw).state_dict()
    lazy = build_optimizer(layer, "lazy_adamw", no_decay=())
    with pytest.raises(
        UserError,
        match=rf"state is of {source}, .* Load it by finetune\.optim\.from_adamw_state\(",
    ):
        lazy.load_state_dict(state)
    from_adamw_state(lazy, state)
    assert len(lazy.state) == len(adamw.state)


def test_adamw_names_the_way_to_load_the_state_of_lazy_adamw():
    state = trained(build_optimizer(nn.Linear(2, 2), "lazy_adamw")).state_dict()
    adamw = build_optimizer(nn.Linear(2, 2), "adamw")
    with pytest.raises(UserError, match=r"Load finetune\.optim\.adapt_state\(optimizer, state\)"):
        adamw.load_state_dict(state)
    adamw.load_state_dict(adapt_state(adamw, state))


def test_the_state_of_other_groups_or_parameters_is_refused():
    state = trained(build_optimizer(nn.Linear(2, 2), "adamw")).state_dict()
    with pytest.raises(
        UserError,
        match=r"groups of 1 \+ 1 parameters, but this run has 2\. Resume with the model, no_decay",
    ):
        build_optimizer(nn.Linear(2, 2), "adamw", no_decay=()).load_state_dict(state)
    other = nn.Module()
    other.kernel, other.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match="it has 'weight' in the place of this run's 'kernel'"):
        build_optimizer(other, "adamw").load_state_dict(state)


def test_a_group_added_later_is_stamped():
    optimizer = build_optimizer(nn.Linear(2, 2), "adamw")
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(1)))]})
    assert {group["optimizer"] for group in optimizer.param_groups} == {"adamw"}


def test_a_run_switches_between_adamw_and_lazy_adamw():
    """adamw, then lazy_adamw, then adamw again, against adamw all along.

    Through the factory, whose groups carry the stamp.
    """
    model, reference = llama(), llama()
    options = {"lr": 0.01, "weight_decay": 0.1, "no_decay": ()}
    oracle, first = (
        build_optimizer(reference, "adamw", **options),
        build_optimizer(model, "adamw", **options),
    )
    step(model, first)
    second = build_optimizer(model, "lazy_adamw", **options)
    from_adamw_state(second, first.state_dict())
    assert step(model, second) == {True}
    third_state = to_adamw_state(second)
    second.release()
    third = build_optimizer(model, "adamw", **options)
    third.load_state_dict(third_state)
    assert step(model, third) == {False}
    for _ in range(3):
        step(reference, oracle)
    assert {group["optimizer"] for group in third.param_groups} == {"adamw"}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter, reference.get_parameter(name), rtol=0, atol=2e-6, msg=name
        )


# -- rules that torch has no class for --


def test_lion_by_hand():
    """Two steps of algorithm 2: lr 0.1, betas (0.5, 0.75), p (1 - 0.05) - 0.1 sign(update)."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = build_optimizer([parameter], "lion", lr=0.1, betas=(0.5, 0.75), weight_decay=0.5)
    parameter.grad = torch.tensor([4.0, -4.0])  # update +, -; momentum 1, -1
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.85, 2.0]))
    parameter.grad = torch.tensor(
        [-0.5, 3.0]
    )  # update 0.25, 1.0: momentum outvotes the first; momentum 0.625, 0.0
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.85 * 0.95 - 0.1, 1.8]))
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.tensor([0.625, 0.0]))


def test_muon_is_torchs_muon_beside_torchs_adamw():
    torch.manual_seed(0)
    start = {"w": torch.randn(4, 6), "b": torch.randn(4)}
    ours, theirs = (
        {name: nn.Parameter(value.clone()) for name, value in start.items()} for _ in range(2)
    )
    optimizer = build_optimizer(ours.items(), "muon", lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    muon = torch.optim.Muon(
        [theirs["w"]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [theirs["b"]], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), fused=True
    )
    for size in range(-10, 2):  # tiny gradients first, where Muon's own eps shows
        for name in start:
            ours[name].grad = theirs[name].grad = torch.randn_like(start[name]) * 10.0**size
        optimizer.step()
        muon.step()
        adamw.step()
    assert torch.equal(ours["w"], theirs["w"])
    assert torch.equal(ours["b"], theirs["b"])


def test_hooks_of_all_optimizers_see_one_step_of_muon():
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    layer = nn.Linear(2, 2)
    trained(build_optimizer(layer.named_parameters(), "muon"))
    for handle in handles:
        handle.remove()
    assert calls == ["pre", "post"]


def test_muon_refuses_a_group_that_is_not_its_own():
    with pytest.raises(
        ValueError, match="a group under Muon holds a parameter that is not a matrix"
    ):
        build_optimizer([{"params": [nn.Parameter(torch.ones(3))], "rule": "muon"}], "muon")
    with pytest.raises(ValueError, match="the rule of a group is 'sgd'"):
        build_optimizer([{"params": [nn.Parameter(torch.ones(3))], "rule": "sgd"}], "muon")
