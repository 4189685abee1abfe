"""LoRA: what trains, what stays, and that merging, saving and reloading lose nothing.

New rows and ties are included.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.data.types import targets_of
from finetune.errors import UserError
from finetune.models.adapters import add_lora, base_of_adapters, merge_lora
from finetune.models.describe import describe_model, token_tables
from finetune.models.export import export_model, verify_export
from finetune.models.language_model import LanguageModel
from finetune.models.load import ModelSpec, load_model
from finetune.models.probes import check_packing
from tests.conftest import MOE
from tests.models.conftest import HEADS, SMALL

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
TIED = {"gpt2", "qwen2", "gemma3"}


def train(model, steps=4):
    language_model = LanguageModel(model)
    ids = torch.randint(90, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = language_model(ids, targets_of(ids))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("new_token_ids", [(), (95, 96)])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma3", "gpt_neox"])
def test_trained_adapters_and_new_rows_survive_merging_and_reloading(
    kind, new_token_ids, make_model, chat_tokenizer, tmp_path
):
    model = make_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old_rows = token_tables(model)[0].detach().clone()
    wrapped = add_lora(model, **LORA, new_token_ids=new_token_ids)
    language_model = LanguageModel(wrapped)
    assert language_model.fused
    check_packing(language_model)
    losses = train(wrapped)
    assert losses[-1] < losses[0]

    ids = torch.arange(90, 97)[None]
    with torch.no_grad():
        trained = wrapped(input_ids=ids).logits
        merged = merge_lora(wrapped)
        torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert set(merged.state_dict()) == set(before)
    table, head = token_tables(merged)
    assert (head is table) == (kind in TIED)
    old = [row for row in range(97) if row not in new_token_ids]
    assert torch.equal(table[old], old_rows[old])
    assert all(not torch.equal(table[row], old_rows[row]) for row in new_token_ids)

    export_model(wrapped, chat_tokenizer, tmp_path / "out", card="")
    assert verify_export(tmp_path / "out", wrapped, ids[0].tolist()) < 1e-5
    assert not Path(tmp_path / "out" / "adapter_config.json").exists()
    with torch.no_grad():
        assert torch.equal(
            wrapped(input_ids=ids).logits, trained
        )  # exporting left the live model alone


def test_only_adapters_and_new_rows_train(make_model):
    model = make_model("qwen2")
    plain = describe_model(add_lora(model, **LORA))["trainable_parameters"]
    with_rows = describe_model(add_lora(make_model("qwen2"), **LORA, new_token_ids=[95, 96]))[
        "trainable_parameters"
    ]
    assert with_rows - plain == 2 * 32  # one row each, shared by input and head


def test_a_loss_through_lora_on_the_head_is_not_short_circuited(make_model):
    """With LoRA on the head, hidden @ weight is not the logits, though at the start it is."""
    model = add_lora(make_model("llama"), **LORA | {"target_modules": ["q_proj", "lm_head"]})
    assert not LanguageModel(model).fused
    train(model)
    assert all(
        p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lm_head.lora" in name
    )


def test_unknown_target_modules_are_named_with_those_there_are(make_model):
    with pytest.raises(
        UserError, match=r"'q_projection' is not a linear layer .* some of .*q_proj, up_proj"
    ):
        add_lora(make_model("llama"), **LORA | {"target_modules": ("k_proj", "q_projection")})


def test_new_rows_of_a_head_with_a_bias_are_refused(make_model):
    with pytest.raises(UserError, match=r"drops the bias .* Train without model.lora"):
        add_lora(make_model("phi"), **LORA, new_token_ids=[96])
    with pytest.raises(
        UserError, match=r"LoRA cannot adapt Llama.* allocate .*\. .* lower its rank"
    ):
        add_lora(make_model("llama"), **LORA | {"rank": 1 << 50})


def test_a_head_that_shares_its_table_is_refused(make_model):
    with pytest.raises(UserError, match="'lm_head' shares its weights with the input embedding"):
        add_lora(
            make_model("qwen2"),
            rank=2,
            alpha=4,
            dropout=0.0,
            target_modules=["q_proj", "lm_head"],
        )


def test_a_head_whose_new_rows_train_is_refused(make_model):
    with pytest.raises(UserError, match="'lm_head' is the output head, and the rows of added tok"):
        add_lora(make_model("llama"), **LORA | {"target_modules": ["lm_head"]}, new_token_ids=[95])


def test_layers_that_share_their_weights_get_no_adapters(make_model, caplog):
    """As in Zamba: what one of them learns would be merged into all."""
    model = make_model("llama")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    second.mlp = first.mlp
    with pytest.raises(UserError, match="'q_proj' shares its weights with other layers"):
        add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules="q_proj")
    wrapped = add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules="all-linear")
    adapted = {name for name, _ in wrapped.named_parameters() if "lora_A" in name}
    assert adapted
    assert not any("q_proj" in name or "mlp" in name for name in adapted)
    assert "linear layers get no adapters" in caplog.text


def test_a_layer_that_computes_more_than_a_product_is_refused():
    config = {"model_type": "phimoe", **SMALL, **HEADS, "num_local_experts": 4}
    model = load_model(ModelSpec(config=config, vocab_size=97))
    with pytest.raises(UserError, match="'router' computes more than a product"):
        add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules="router")


def test_experts_that_get_no_adapters_are_said(caplog):
    model = load_model(ModelSpec(config=MOE, vocab_size=97))
    add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules="all-linear")
    assert f"the {2 * 4 * 3 * 16 * 32:,} weights of the experts" in caplog.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox", "gpt2"])
def test_adapters_are_also_kept_by_themselves(
    make_model, kind, added, chat_tokenizer, tmp_path, monkeypatch
):
    base, rows = tmp_path / "base", len(chat_tokenizer)
    make_model(kind, rows - 2 * added).save_pretrained(base)
    bare = load_model(ModelSpec(name=str(base)))
    bare.resize_token_embeddings(rows)
    model = add_lora(bare, **LORA, new_token_ids=[rows - 2, rows - 1] if added else [3, 5])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    export_model(model, chat_tokenizer, tmp_path / "model", card="")
    folder = tmp_path / "model" / "adapters"
    assert (folder / "adapter_model.safetensors").is_file()
    shown: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "model")
    exec((folder / "README.md").read_text().split("```python")[1].split("```")[0], shown)
    ids = torch.arange(rows - 12, rows)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(ids).logits
        torch.testing.assert_close(shown["model"].eval()(ids).logits, merged, rtol=1e-4, atol=1e-4)


def test_adapters_of_random_weights_or_beside_active_rows_are_not_kept(make_model):
    wrapped = add_lora(make_model("llama"), **LORA)
    assert base_of_adapters(wrapped) == ""
    wrapped.get_base_model().name_or_path = "somewhere"
    assert base_of_adapters(wrapped) == "somewhere"
    for name in ("models/tiny.gguf", "package:tiny"):
        wrapped.get_base_model().name_or_path = name
        assert base_of_adapters(wrapped) == ""
    wrapped.get_input_embeddings().weight.requires_grad_(True)
    assert base_of_adapters(wrapped) == ""
