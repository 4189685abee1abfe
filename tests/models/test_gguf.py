"""From a .gguf file, written here, to a folder: weights, tokenizer, licence, cache."""

import gguf
import numpy as np
import pytest
import torch

from finetune.errors import UserError
from finetune.models.load import ModelSpec, load_model
from finetune.models.locate import resolve_name
from finetune.models.tokenizers import load_tokenizer
from finetune.report.card import license_of

Q8 = gguf.GGMLQuantizationType.Q8_0


def write_gguf(path, width=32, heads=4, inner=64):
    """A llama of one layer, quantised to 8 bits; returns the weights that were quantised."""
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *map(chr, range(33, 127)),
        "Ġ",
        "Ċ",
        "he",
    ]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    squares = ["attn_q", "attn_k", "attn_v", "attn_output"]
    shapes = {f"blk.0.{name}.weight": (width, width) for name in squares}
    shapes |= {
        "blk.0.ffn_gate.weight": (inner, width),
        "blk.0.ffn_up.weight": (inner, width),
        "blk.0.ffn_down.weight": (width, inner),
    }
    shapes |= {"token_embd.weight": (len(tokens), width)}
    shapes |= dict.fromkeys(
        ["output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"], (width,)
    )
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    for name, weight in weights.items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, Q8), raw_dtype=Q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def test_a_gguf_file_becomes_a_float32_model_with_its_tokenizer_and_licence(tmp_path, cache):
    weights = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = (
        load_model(ModelSpec(name=str(tmp_path / "tiny.gguf"))),
        load_tokenizer(ModelSpec(name=str(tmp_path / "tiny.gguf"))),
    )
    table = model.get_input_embeddings().weight
    assert table.dtype == torch.float32
    exact = gguf.quants.dequantize(gguf.quants.quantize(weights["token_embd.weight"], Q8), Q8)
    torch.testing.assert_close(table.detach(), torch.from_numpy(exact))
    assert model.get_output_embeddings().weight is table  # no output.weight in the file: tied
    assert tokenizer.tokenize("he he!") == ["he", "Ġ", "he", "!"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert license_of(resolve_name(str(tmp_path / "tiny.gguf"))) == "apache-2.0"
    assert [path.name.startswith("tiny-") for path in cache.iterdir()] == [
        True
    ]  # nothing half-made beside it


def test_the_conversion_happens_once_for_a_file_and_again_for_a_changed_one(tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    first = resolve_name(str(file))
    mark = cache / first / "config.json"
    before = mark.stat().st_mtime_ns
    assert resolve_name(str(file)) == first
    assert mark.stat().st_mtime_ns == before
    write_gguf(file, inner=96)
    assert resolve_name(str(file)) != first
    assert load_model(ModelSpec(name=str(file))).config.intermediate_size == 96


def test_an_installed_package_with_a_gguf_loads(tmp_path, monkeypatch):
    package = tmp_path / "a_tiny_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    write_gguf(package / "model.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_model(ModelSpec(name="package:a-tiny-model")).config.hidden_size == 32


def test_what_is_no_gguf_is_refused_and_leaves_nothing(tmp_path, cache):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad.gguf is not a .gguf file that transformers can read"):
        resolve_name(str(tmp_path / "bad.gguf"))
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*\. Set FINETUNE_CACHE"):
        resolve_name(str(tmp_path / "tiny.gguf"))
