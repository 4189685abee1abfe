"""Precision, description, model card, activation checkpointing, compiling."""

import logging

import pytest
import torch
import yaml

from finetune.data.types import targets_of
from finetune.errors import UserError
from finetune.inference.generation import GenerationSettings, generate
from finetune.models.adapters import add_lora
from finetune.models.describe import describe_model
from finetune.models.language_model import LanguageModel
from finetune.models.speed import (
    compile_decoder,
    enable_activation_checkpointing,
    has_native_bf16,
    resolve_precision,
    uncompiled,
)
from finetune.models.vocabulary.activate import activate_vocabulary, active_modules
from finetune.report.card import license_of, model_card

BF16_CPU, PLAIN_CPU = (
    {"avx512_bf16": True, "avx2": True},
    {"avx512_bf16": False, "amx_bf16": False, "avx2": True},
)


@pytest.mark.parametrize(
    ("chip", "expected"), [(BF16_CPU, "bf16"), (PLAIN_CPU, "fp32"), ({"amx_bf16": True}, "bf16")]
)
def test_auto_takes_bf16_where_the_chip_has_it(chip, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: chip)
    precision, reason = resolve_precision("auto", "cpu")
    assert precision == expected
    assert reason.startswith(f"{expected} matrix products, since this CPU has ")


def test_this_machine_has_an_answer():
    assert resolve_precision("auto", torch.device("cpu"))[0] == (
        "bf16" if has_native_bf16("cpu") else "fp32"
    )


def test_emulated_bf16_is_taken_when_asked_for_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: PLAIN_CPU)
    with caplog.at_level(logging.WARNING):
        assert resolve_precision("bf16", "cpu")[0] == "bf16"
    assert "many times slower than fp32" in caplog.text


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match='"fp16", which needs a CUDA device, not this CPU'):
        resolve_precision("fp16", "cpu")


def test_a_description_counts_shared_parameters_once(make_model):
    tied, untied = describe_model(make_model("qwen2")), describe_model(make_model("llama"))
    table = 97 * 32
    assert (tied["tied"], tied["token_table_parameters"]) == (True, table)
    assert (untied["tied"], untied["token_table_parameters"]) == (False, 2 * table)
    assert (
        tied["parameters"]
        == sum(p.numel() for p in make_model("qwen2").parameters())
        == tied["trainable_parameters"]
    )
    assert tied["token_table_share"] == table / tied["parameters"]
    assert (tied["layers"], tied["hidden_size"], tied["vocab_size"]) == (2, 32, 97)
    assert (tied["architecture"], tied["lora"]) == ("Qwen2ForCausalLM", False)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_description_is_of_the_model_whichever_rows_train(kind, make_model):
    model, plain = make_model(kind), describe_model(make_model(kind))
    activate_vocabulary(model, range(20), spare=5)
    described = describe_model(model)
    tables = 1 if kind == "qwen2" else 2
    trainable = plain["parameters"] + 32 * (tables * (20 + 5 - 97) + 1)  # and the shift of the head
    assert described == {**plain, "trainable_parameters": trainable}


@pytest.mark.parametrize("new_token_ids", [(), (96,)])
def test_a_description_looks_behind_lora(new_token_ids, make_model):
    plain = make_model("qwen2")
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj"]}
    described = describe_model(add_lora(make_model("qwen2"), **lora, new_token_ids=new_token_ids))
    assert described["trainable_parameters"] == 2 * 2 * (32 + 32) + 32 * len(new_token_ids)
    assert (
        described["parameters"]
        == describe_model(plain)["parameters"] + described["trainable_parameters"]
    )
    assert (described["tied"], described["lora"], described["vocab_size"]) == (True, True, 97)


CARD = {
    "title": "My model",
    "base_model": "org/base",
    "license": "apache-2.0",
    "data": ["a.jsonl: 3 rows"],
    "metrics": {"before": {"loss": 2.5, "chrf": 20.125}, "after": {"loss": 1.5, "chrf": 34.5}},
    "config": "model:\n  name: org/base\n",
    "command": "finetune train a.yaml",
}


def test_a_card_has_front_matter_and_the_facts():
    card = model_card(**CARD)
    _, front, text = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert (matter["base_model"], matter["license"], matter["library_name"]) == (
        "org/base",
        "apache-2.0",
        "transformers",
    )
    for line in (
        "| | loss | chrf |",
        "| before | 2.5 | 20.12 |",
        "| after | 1.5 | 34.5 |",
        "- a.jsonl: 3 rows",
        "  name: org/base",
    ):
        assert line in text.splitlines() or f"{line} " in text.splitlines(), line
    assert "`finetune train a.yaml`" in text


def test_a_card_says_what_is_not_known():
    assert "licence of the base model is not known" in model_card(**CARD | {"license": None})
    scratch = model_card(**CARD | {"base_model": None, "license": None, "metrics": {}})
    assert "random initial weights" in scratch
    assert "None were measured." in scratch
    assert "base_model" not in scratch.split("---")[1]


def test_the_licence_is_read_from_a_model_folder(tmp_path):
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(
        "---\ntags:\n- a\nlicense: mit\n---\n# Title\nlicense: none\n"
    )
    assert license_of(str(tmp_path)) == "mit"
    for text in ("# Title\nlicense: none\n", "---\nlicense:\nlanguage: en\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense:\n- apache-2.0\n- mit\n---\n")
    assert license_of(str(tmp_path)) == "apache-2.0"
    assert license_of("org/model-on-the-hub") is None


def batch():
    ids = torch.arange(24).reshape(2, 12)
    return ids, targets_of(ids)


@pytest.mark.parametrize("with_lora", [False, True])
def test_activation_checkpointing_keeps_the_gradients_and_runs_layers_twice(with_lora, make_model):
    def gradients(checkpointing):
        model = make_model("llama")
        lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": "all-linear"}
        torch.manual_seed(1)
        language_model = LanguageModel(add_lora(model, **lora) if with_lora else model)
        if checkpointing:
            enable_activation_checkpointing(language_model)
        language_model.train()
        calls = []
        language_model.causal_lm.model.layers[0].self_attn.register_forward_pre_hook(
            lambda *_: calls.append(1)
        )
        language_model(*batch()).backward()
        return [p.grad for p in language_model.parameters() if p.requires_grad], len(calls)

    plain, once = gradients(False)
    checkpointed, twice = gradients(True)
    assert (once, twice) == (1, 2)
    for ours, theirs in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute"
)  # torch hides it in its own way, which the suite's filter undoes
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_compiling_changes_no_name_and_makes_kernels_once_for_all_layers(
    kind, make_model, monkeypatch
):
    depth = {"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4}
    language_model, graphs = LanguageModel(make_model(kind, **depth)), []
    language_model.eval()
    batches = [torch.randint(0, 97, shape) for shape in ((2, 9), (3, 17), (4, 30))]
    expected, names = (
        [language_model(ids, targets_of(ids)) for ids in batches],
        list(language_model.state_dict()),
    )

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compile_here = torch.nn.Module.compile  # with a backend that needs no C++ compiler
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **options: compile_here(module, backend=backend, **options),
    )
    compile_decoder(language_model)
    for ids, loss in zip(batches, expected, strict=True):
        torch.testing.assert_close(language_model(ids, targets_of(ids)), loss)
    assert len(graphs) == 1
    assert sum(part._compiled_call_impl is not None for part in language_model.modules()) == 4
    assert list(language_model.state_dict()) == names
    settings = GenerationSettings.greedy(4)
    with uncompiled(True):
        generate(language_model.causal_lm, [[1, 2, 3]], settings=settings, batch_size=1)
    assert len(graphs) == 1
    with uncompiled(False):
        generate(language_model.causal_lm, [[1, 2, 3]], settings=settings, batch_size=1)
    assert len(graphs) > 1  # what it is there to avoid


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute"
)  # torch hides it in its own way, which the suite's filter undoes
@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "gpt_neox"])
def test_an_active_vocabulary_trains_and_grows_compiled_as_it_does_otherwise(
    kind, make_model, monkeypatch
):
    compile_here, graphs = torch.nn.Module.compile, []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **options: compile_here(module, backend=backend, **options),
    )
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        model = make_model(kind)
        activate_vocabulary(model, range(0, 97, 2), spare=4)
        language_model = LanguageModel(model)
        if compiled:
            compile_decoder(language_model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(4):
            if step == 2:
                for module in {
                    id(module.vocabulary): module for module in active_modules(model)
                }.values():
                    assert not len(module.vocabulary.grow(module.weight, torch.tensor([1, 5, 33])))
            loss = language_model(ids, targets_of(ids))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    assert graphs
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][-1] < 0.95 * found[0][0]
