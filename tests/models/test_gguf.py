"""From a .gguf file, written here, to a folder: weights, tokenizer, licence, cache."""

import os
import resource
import stat
from pathlib import Path

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


def write_gguf(path, width=32, heads=4, inner=64, *, pre="gpt-2", metadata=None, vectors=None):
    """A llama of one layer, quantised to 8 bits; returns the weights that were quantised.

    `pre` names the rule of words. `metadata` and `vectors` (name -> length) are added.
    """
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *map(chr, range(33, 127)),
        "Ġ",
        "Ċ",
        "he",
        "ĊĊ",
        "the",
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
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "Ċ Ċ"])
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
    shapes |= {name: (length,) for name, length in (vectors or {}).items()}
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


def test_files_of_one_name_size_and_time_are_told_apart(tmp_path):
    one, other = (tmp_path / name / "tiny.gguf" for name in ("one", "other"))
    for file in (one, other):
        file.parent.mkdir()
    write_gguf(one)
    data = bytearray(one.read_bytes())
    data[-1] ^= 0x80  # the sign of the last weight
    other.write_bytes(data)
    os.utime(other, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    theirs = [load_model(ModelSpec(name=str(file))).state_dict() for file in (one, other)]
    assert any(not torch.equal(theirs[0][name], theirs[1][name]) for name in theirs[0])


def test_users_may_share_the_conversions(tmp_path):
    """They have the rights of any new file: safetensors and tempfile give them to one user."""
    write_gguf(tmp_path / "tiny.gguf")
    before = os.umask(0o022)
    try:
        folder = Path(resolve_name(str(tmp_path / "tiny.gguf")))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}


@pytest.mark.parametrize("room", [1_000, 20_000], ids=["for no tokenizer", "for no weights"])
def test_a_full_cache_is_named(tmp_path, cache, room):
    write_gguf(tmp_path / "tiny.gguf")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not be .*: File too large\. .* FINETUNE_CACHE"):
            resolve_name(str(tmp_path / "tiny.gguf"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache.iterdir()) == []


def test_an_installed_package_with_a_gguf_loads(tmp_path, monkeypatch):
    package = tmp_path / "a_tiny_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    write_gguf(package / "model.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_model(ModelSpec(name="package:a-tiny-model"))
    assert model.config.hidden_size == 32
    assert model.name_or_path == "package:a-tiny-model"  # not a folder of the cache


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


UNREAD = {  # what is in the file -> words of the sentence
    "the scales of Llama 3": ({"vectors": {"rope_freqs.weight": 4}}, r"\(rope_freqs\.weight\)"),
    "the scales of Phi 3": (
        {"vectors": {"rope_factors_long.weight": 4, "rope_factors_short.weight": 4}},
        r"scales its rotary embeddings \(rope_factors_long\.weight\)",
    ),
    "yarn": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"rotary embeddings \(yarn\)"),
    "a factor": ({"metadata": {"llama.rope.scaling.factor": 8.0}}, r"embeddings \(linear\)"),
    "an old factor": ({"metadata": {"llama.rope.scale_linear": 4.0}}, r"embeddings \(linear\)"),
    "biases": (
        {"vectors": {"blk.0.attn_q.bias": 32, "blk.0.ffn_up.bias": 64}},
        r"the weights blk\.0\.attn_q\.bias and 1 more, which .* a \.gguf file of llama",
    ),
    "a rule of words": ({"pre": "viking"}, "by the rule 'viking' of llama.cpp"),
    "no rule of words": ({"pre": None}, "by the rule 'default' of llama.cpp"),
}


@pytest.mark.parametrize("what", UNREAD)
def test_a_file_that_would_become_another_model_is_refused(what, tmp_path, cache):
    changes, says = UNREAD[what]
    write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(UserError, match=rf"{says}.*\. Take the model's Hugging Face folder"):
        resolve_name(str(tmp_path / "tiny.gguf"))
    assert list(cache.iterdir()) == []


def test_a_weight_of_another_shape_is_named(tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf", vectors={"output_norm.weight": 16})
    with pytest.raises(UserError, match=r"model.norm.weight has the shape \(16,\), and \(32,\) is"):
        resolve_name(str(tmp_path / "tiny.gguf"))


def test_a_file_that_says_that_nothing_is_scaled_is_read(tmp_path):
    plain = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0}
    write_gguf(tmp_path / "tiny.gguf", metadata=plain)
    assert load_model(ModelSpec(name=str(tmp_path / "tiny.gguf"))).config.hidden_size == 32


def write_starcoder2(path, theta=10_000.0, **numbers):
    """A random Starcoder 2, of which transformers reads neither the rotary base nor a window.

    numbers: `sliding_window` and `rope_dimension_count`.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "starcoder2", **sizes, **heads, "tie_word_embeddings": True}
    model = load_model(ModelSpec(config=config, vocab_size=97))
    writer = gguf.GGUFWriter(str(path), "starcoder2")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(theta)
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("starcoder")
    writer.add_token_list(["<|endoftext|>", *map(chr, range(33, 127)), "Ġ", "he"])
    writer.add_token_types([3] + [1] * 96)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STARCODER2, 1)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(known, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("usual", "other", "says"),
    [
        ({}, {"theta": 100_000.0}, "of base 100000, and transformers reads 10000 from it"),
        ({"rope_dimension_count": 8}, {"rope_dimension_count": 4}, "of width 4, .* reads 8"),
        ({"sliding_window": 64}, {"sliding_window": 16}, "a window of 16, .* reads none"),
    ],
)
def test_a_number_that_is_not_read_is_refused(usual, other, says, tmp_path):
    write_starcoder2(tmp_path / "usual.gguf", **usual)
    assert load_model(ModelSpec(name=str(tmp_path / "usual.gguf"))).config.hidden_size == 32
    write_starcoder2(tmp_path / "other.gguf", **other)
    with pytest.raises(UserError, match=says):
        resolve_name(str(tmp_path / "other.gguf"))


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("gpt-2", "\n\n1", ["Ċ", "Ċ", "1"]),
        ("olmo", "\n\n1", ["Ċ", "Ċ", "1"]),
        ("smollm", "\n\n12", ["ĊĊ", "1", "2"]),
        ("starcoder", "\n\n1", ["ĊĊ", "1"]),
        ("stablelm2", "\n\n1", ["ĊĊ", "1"]),
        ("dbrx", "the", ["t", "he"]),
        ("llama-bpe", "the", ["the"]),  # a word that is a token, though no merge makes it
        ("tekken", "the", ["the"]),
    ],
)
def test_texts_are_cut_as_llama_cpp_cuts_them(pre, text, tokens, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", pre=pre)
    assert load_tokenizer(ModelSpec(name=str(tmp_path / "tiny.gguf"))).tokenize(text) == tokens
