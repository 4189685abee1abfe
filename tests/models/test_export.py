"""Exports: plain folders that reload to the same logits, replaced whole or not at all."""

import copy
import json
import resource
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.types import targets_of
from finetune.errors import UserError, disk_refusal
from finetune.models.adapters import add_lora
from finetune.models.describe import token_tables
from finetune.models.export import export_model, verify_export
from finetune.models.language_model import LanguageModel
from finetune.models.tokenizers import fit_to_tokenizer, set_template
from finetune.models.trim.keep import needed_tokens
from finetune.models.trim.tokenizer import trim_tokenizer
from finetune.models.vocabulary.activate import activate_vocabulary, active_modules

IDS = [5, 9, 3, 7, 11]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["gpt2", "llama", "qwen2", "gemma3", "gpt_neox", "phi", "cohere", "granite"]
)
def test_an_export_reloads_with_its_logits_tie_and_stops(
    kind, dtype, make_model, chat_tokenizer, tmp_path
):
    model = make_model(kind, vocab_size=len(chat_tokenizer))
    fit_to_tokenizer(model, chat_tokenizer, set_template(chat_tokenizer))
    dest = tmp_path / "deep" / "model"
    export_model(model, chat_tokenizer, dest, card="# A card\n", dtype=dtype)
    verify_export(dest, model, IDS)
    reloaded = AutoModelForCausalLM.from_pretrained(dest, dtype="auto")
    assert reloaded.dtype == (dtype or torch.float32)
    ours, theirs = token_tables(model), token_tables(reloaded)
    assert (ours[0] is ours[1]) == (theirs[0] is theirs[1]) == reloaded.config.tie_word_embeddings
    with safe_open(dest / "model.safetensors", "pt") as weights:
        stored = sum(weights.get_tensor(name).numel() for name in list(weights.keys()))
    assert stored == sum(
        parameter.numel() for parameter in model.parameters()
    )  # a shared table is stored once
    assert reloaded.generation_config.eos_token_id == chat_tokenizer.eos_token_id
    assert reloaded.generation_config.pad_token_id == chat_tokenizer.pad_token_id
    assert AutoTokenizer.from_pretrained(dest).chat_template == chat_tokenizer.chat_template
    assert (dest / "README.md").read_text() == "# A card\n"
    assert [path.name for path in dest.parent.iterdir()] == ["model"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
def test_an_active_vocabulary_reloads_with_its_logits_and_its_inactive_rows(
    kind, lora, make_model, chat_tokenizer, tmp_path
):
    model = make_model(kind, vocab_size=len(chat_tokenizer))
    before = [table.detach().clone() for table in token_tables(model)]
    active = torch.arange(0, len(before[0]), 3)
    activate_vocabulary(model, active.tolist(), spare=2)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    compact = {id(module.weight): module.weight for module in active_modules(model)}.values()
    if lora:
        model = add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules="all-linear")
    for weight in compact:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = active[torch.randint(0, len(active), (4, 9))]
    for _ in range(3):
        LanguageModel(model)(ids, targets_of(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
    export_model(model, chat_tokenizer, tmp_path / "model", card="")
    ids = torch.randint(0, len(before[0]), (2, 9))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(
        reloaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    after = token_tables(reloaded)
    assert (after[0] is after[1]) == tied == (kind == "qwen2")
    for old, new in zip(before, after, strict=True):
        moved = (old != new).any(1)
        assert moved[active].any()
        moved[active] = False
        assert not moved.any()  # bit for bit


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
def test_an_active_vocabulary_is_written_in_the_dtype_that_is_asked_for(
    kind, make_model, chat_tokenizer, tmp_path
):
    model = make_model(kind, vocab_size=len(chat_tokenizer))
    activate_vocabulary(model, range(0, len(chat_tokenizer), 3))
    export_model(model, chat_tokenizer, tmp_path / "model", card="", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert active_modules(model), "the model in memory stays as it is"


def test_an_export_replaces_an_earlier_one(make_model, chat_tokenizer, tmp_path):
    model, dest = make_model("llama"), tmp_path / "model"
    export_model(model, chat_tokenizer, dest, card="old")
    (dest / "model-00002-of-00002.safetensors").touch()  # of an earlier export, in parts
    marker = json.loads((dest / ".finetune.json").read_text())
    marker["files"].append("model-00002-of-00002.safetensors")
    (dest / ".finetune.json").write_text(json.dumps(marker))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(
        UserError, match=r"is not the trained model: its logits differ by 0.5 of the largest"
    ):
        verify_export(dest, model, IDS)
    export_model(model, chat_tokenizer, dest, card="new")
    verify_export(dest, model, IDS)
    assert not (dest / "model-00002-of-00002.safetensors").exists()
    assert (dest / "README.md").read_text() == "new"


def test_a_folder_that_holds_something_else_is_not_replaced(make_model, chat_tokenizer, tmp_path):
    model, dest = make_model("llama"), tmp_path / "model"
    dest.mkdir()
    (dest / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a model that finetune wrote"):
        export_model(model, chat_tokenizer, dest, card="")
    (dest / "thesis.txt").rename(tmp_path / "thesis.txt")
    model.save_pretrained(dest)  # a base model is someone's too
    before = (dest / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is not a model that finetune wrote"):
        export_model(model, chat_tokenizer, dest, card="")
    assert (dest / "model.safetensors").read_bytes() == before
    shutil.rmtree(dest)
    export_model(model, chat_tokenizer, dest, card="")
    (dest / "model.gguf").write_text("converted by another program")
    with pytest.raises(UserError, match=r"model\.gguf would be deleted with the model in"):
        export_model(model, chat_tokenizer, dest, card="")
    assert (dest / "model.gguf").read_text() == "converted by another program"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis.txt"]


def test_a_destination_that_cannot_be_made_is_named(make_model, chat_tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"could not be written to .*/file/model: (File exists|Not a directory)"
    ):
        export_model(make_model("llama"), chat_tokenizer, tmp_path / "file" / "model", card="")


@pytest.fixture
def small_disk():
    """A limit on the size of a file stands in for the disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_a_full_disk_leaves_the_earlier_export_whole(
    make_model, chat_tokenizer, tmp_path, small_disk
):
    model, dest = make_model("llama"), tmp_path / "model"
    export_model(model, chat_tokenizer, dest, card="old")
    small_disk((dest / "model.safetensors").stat().st_size // 2)
    with pytest.raises(
        UserError,
        match=rf"the model could not be written to {dest}: .* the earlier export is untouched",
    ):
        export_model(model, chat_tokenizer, dest, card="new")
    verify_export(dest, model, IDS)
    assert (dest / "README.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_full_for_the_tokenizer_leaves_the_earlier_export_whole(
    make_model, chat_tokenizer, tmp_path, small_disk
):
    """tokenizers raises an error of its own, and no OSError."""
    model, dest = make_model("llama"), tmp_path / "model"
    export_model(model, chat_tokenizer, dest, card="old")
    weights = (dest / "model.safetensors").stat().st_size
    large = copy.deepcopy(chat_tokenizer)
    large.add_tokens([f"<word {number}>" for number in range(weights // 50)])
    small_disk(2 * weights)
    with pytest.raises(UserError, match=r"File too large; the earlier export is untouched"):
        export_model(model, large, dest, card="new")
    with pytest.raises(OSError, match="File too large") as refused:
        trim_tokenizer(large, needed_tokens(large))
    assert "could not be written: File too large" in str(disk_refusal(refused.value))
    assert (dest / "README.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_lost_tie_is_found(make_model, chat_tokenizer, tmp_path):
    model, dest = make_model("qwen2"), tmp_path / "model"
    export_model(model, chat_tokenizer, dest, card="")
    config = json.loads((dest / "config.json").read_text())
    (dest / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match="is not the trained model"):
        verify_export(dest, model, IDS)


@pytest.mark.parametrize("of_text", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_config_of_the_whole_decides_whether_tables_are_tied(
    tied, of_text, make_reader_of_pictures, chat_tokenizer, tmp_path
):
    model = make_reader_of_pictures(
        len(chat_tokenizer),
        of_text={"tie_word_embeddings": of_text},
        tie_word_embeddings=tied,
    )
    export_model(model, chat_tokenizer, tmp_path / "model", card="")
    assert verify_export(tmp_path / "model", model, IDS) < 1e-5


def test_an_export_that_does_not_load_is_explained(make_model, chat_tokenizer, tmp_path):
    model, dest = make_model("llama"), tmp_path / "model"
    export_model(model, chat_tokenizer, dest, card="")
    (dest / "model.safetensors").unlink()
    with pytest.raises(UserError, match="does not load"):
        verify_export(dest, model, IDS)


def test_an_export_that_does_not_run_leaves_nothing_behind(
    make_reader_of_pictures, chat_tokenizer, tmp_path
):
    model = make_reader_of_pictures(len(chat_tokenizer))
    export_model(model, chat_tokenizer, tmp_path / "out", card="")
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_token_id": None}))
    with pytest.raises(UserError, match=r"out does not (run|load): .*\. It is deleted"):
        verify_export(tmp_path / "out", model, IDS)
    assert not list(tmp_path.iterdir())


def test_a_wrong_export_leaves_nothing_behind(make_model, chat_tokenizer, tmp_path):
    model = make_model("llama", len(chat_tokenizer))
    export_model(model, chat_tokenizer, tmp_path / "out", card="")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.normal_()
    with pytest.raises(UserError, match=r"is not the trained model: .* It is deleted"):
        verify_export(tmp_path / "out", model, [5, 6, 7, 8])
    assert not list(tmp_path.iterdir())
