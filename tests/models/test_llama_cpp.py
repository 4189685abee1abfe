"""GGUF files run by llama.cpp itself: its answers, log-probabilities and tokens are ours."""

import copy
import json
import random
import unicodedata

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.data.formats.rendering import PLAIN, ChatTemplate
from finetune.errors import UserError
from finetune.models.llama_cpp.families import family_of
from finetune.models.llama_cpp.modelfile import modelfile, ollama_template
from finetune.models.llama_cpp.pre_tokenizers import PATTERNS, llama_cpp_name
from finetune.models.llama_cpp.tokens import read_words, unlike_transformers
from finetune.models.llama_cpp.write import check_gguf, encoded, rounded, weights_of, write_gguf
from finetune.models.load import ModelSpec, load_model
from finetune.models.tokenizers import (
    fit_to_tokenizer,
    load_tokenizer,
    set_template,
    train_tokenizer,
)
from finetune.models.trim.keep import bpe_of, frequent_tokens, needed_tokens, tokens_of_texts
from finetune.models.trim.model import trim_model
from finetune.models.trim.tokenizer import trim_tokenizer
from scripts.runtime import running
from tests.data import stock
from tests.models.conftest import HEADS, KINDS, SMALL
from tests.vocabularies import real_tokenizer

ROPE = {"rope_type": "default", "rope_theta": 1e4}
GEMMA = {
    "model_type": "gemma3_text", **SMALL, **HEADS, "num_hidden_layers": 6, "head_dim": 8,
    "query_pre_attn_scalar": 8, "sliding_window": 16, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def llama_cpp():
    """The runtime; the test is skipped if it is not installed."""
    pytest.importorskip("xllamacpp")
    return running


FAMILIES = {
    "llama": KINDS["llama"] | {"attention_bias": True, "mlp_bias": True},
    "smollm2": KINDS["llama"]
    | {"tie_word_embeddings": True, "rope_parameters": ROPE | {"rope_theta": 1e5}},
    "mistral": {"model_type": "mistral", **SMALL, **HEADS, "sliding_window": None, "head_dim": 16},
    "gpt2": KINDS["gpt2"],
    "gemma3_text": GEMMA,
    "qwen2": KINDS["qwen2"],
    "qwen3": {"model_type": "qwen3", **SMALL, **HEADS, "head_dim": 16},
    "gpt_neox": KINDS["gpt_neox"] | {"hidden_act": "gelu_new"},
    "gpt_neox_tied": KINDS["gpt_neox"] | {"tie_word_embeddings": True},
}


def tiny(kind, rows, **changes):
    """Return a random model with weights that are large enough for the context to matter."""
    torch.manual_seed(0)
    model = load_model(ModelSpec(config=FAMILIES[kind] | changes, vocab_size=rows))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def greedy(model, prompt, count):
    """Return the greedy answer, its log-probabilities, and how sure each choice was, in nats."""
    ids, scores, margins = list(prompt), [], []
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
        best = logits.topk(2)
        ids.append(int(best.indices[0]))
        scores.append(float(best.values[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return ids[len(prompt) :], scores, margins


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("trimmed", [False, True])
def test_llama_cpp_answers_as_transformers_does(kind, trimmed, tmp_path, chat_tokenizer, llama_cpp):
    tokenizer, model = chat_tokenizer, tiny(kind, len(chat_tokenizer))
    fit_to_tokenizer(model, tokenizer, set_template(tokenizer))
    if trimmed:
        keep = needed_tokens(tokenizer) | tokens_of_texts(tokenizer, ["What is this?"])
        smaller = trim_tokenizer(tokenizer, keep, rows=len(tokenizer))
        tokenizer, model = smaller.tokenizer, trim_model(model, smaller.kept)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", name="tiny")
    compared = 0
    with llama_cpp(tmp_path / "m.gguf", context=64) as runtime:
        for text in ("What is this?", "It is a test", "words of a few. 123"):
            prompt = tokenizer(text).input_ids
            assert runtime.tokens(text) == prompt
            ours, scores, margins = greedy(model, prompt, 20)
            theirs, found = runtime.greedy(prompt, 20)
            for place, (token, score) in enumerate(zip(theirs, found)):
                if margins[place] < 1e-3:  # a tie: what follows may differ
                    break
                assert token == ours[place]
                if score is not None:
                    assert score == pytest.approx(scores[place], abs=2e-3)
                    compared += 1
    assert compared >= 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_the_smaller_formats_lie_near(kind, tmp_path, chat_tokenizer, llama_cpp):
    model = tiny("llama", len(chat_tokenizer))
    write_gguf(model, chat_tokenizer, tmp_path / "m.gguf", kind, name="tiny")
    prompt = chat_tokenizer("What is this?").input_ids
    ours, scores, _ = greedy(model, prompt, 1)
    with llama_cpp(tmp_path / "m.gguf", context=64) as runtime:
        theirs, found = runtime.greedy(prompt, 1)
    if theirs == ours and found[0] is not None:
        assert found[0] == pytest.approx(scores[0], abs=0.2)
    size = {"f16": 2, "bf16": 2, "q8_0": 34 / 32}[kind]
    stored = (tmp_path / "m.gguf").stat().st_size
    assert stored < size * sum(p.numel() for p in model.parameters()) + 30_000


TEXTS = [
    "The file could not be saved. Please try again in 15 minutes, or call 0800-1234.",
    "Le fichier n'a pas pu être enregistré ; veuillez réessayer dans 15 minutes.",
    "def add(a, b):\n    return a + b  # the sum\n\n\tprint(add(1, 2))",
    "Straße, Übergröße, naïve café — 100 % «sûr» … 🙂🇫🇷 안녕 世界",
    "Quarks and leptons: unmistakably heterogeneous phenomena, 31415926535.",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, 日本語, 한국어",
    "  leading, trailing  \n\n\t mixed  blanks ",
]


def texts(count):
    """Return texts put together from words of all kinds."""
    chance = random.Random(0)
    words = [word for text in TEXTS for word in text.split(" ")]
    joined = [" ".join(chance.choices(words, k=chance.randint(1, 12))) for _ in range(count)]
    return [unicodedata.normalize("NFC", text) for text in (*TEXTS, *joined) if text.strip()]


def variant(name):
    """Return a real tokenizer, or one without whole words, as DBRX has."""
    name, _, change = name.partition(" with ")
    tokenizer = real_tokenizer(name)
    if change == "merges alone":
        tree = json.loads(tokenizer.backend_tokenizer.to_str())
        tree["model"]["ignore_merges"] = False
        raw = Tokenizer.from_str(json.dumps(tree))
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=tokenizer.bos_token)
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("smollm2", "smollm2"),
        ("gpt2", "gpt2"),
        ("qwen3", "qwen3"),
        ("llama3_1", "llama"),
        ("llama2", "llama"),
        ("gemma3", "gemma3_text"),
        ("llama3_1 with merges alone", "llama"),
    ],
)
@pytest.mark.parametrize("trimmed", [False, True])
def test_llama_cpp_cuts_texts_into_the_same_tokens(name, kind, trimmed, tmp_path, llama_cpp):
    """200 texts within and outside of K.

    transformers puts no blank before a text of Llama 2 that begins with one; sentencepiece does.
    """
    tokenizer = variant(name)
    if trimmed:
        keep = needed_tokens(tokenizer) | tokens_of_texts(tokenizer, TEXTS[:3])
        keep |= frequent_tokens(bpe_of(tokenizer), 500)
        tokenizer = trim_tokenizer(tokenizer, keep).tokenizer
    rows = max(tokenizer.get_vocab().values()) + 1
    small = {"num_hidden_layers": 6 if kind == "gemma3_text" else 1} if kind != "gpt2" else {}
    model = tiny(kind, rows, **small)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f16", name="tiny")
    with llama_cpp(tmp_path / "m.gguf", context=64) as runtime:
        different = [
            (text, found, ours)
            for text in texts(200)
            if name != "llama2" or not text.startswith(" ")
            if (found := runtime.tokens(text)) != (ours := tokenizer(text).input_ids)
        ]
    assert different == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "template", "kind"),
    [
        ("llama2", "ZEPHYR", "llama"),  # begins with text
        ("llama2", "LLAMA2", "llama"),  # begins with the BOS token
        ("smollm2", "CHATML", "smollm2"),
        ("gemma3", "GEMMA", "gemma3_text"),
    ],
)
def test_llama_cpp_cuts_conversations_as_they_were_learnt(
    name, template, kind, tmp_path, llama_cpp
):
    """The tokenizer puts a BOS token before a text; the template decides if a chat has one."""
    tokenizer = copy.deepcopy(real_tokenizer(name))
    tokenizer.chat_template = getattr(stock, template)
    rows = max(tokenizer.get_vocab().values()) + 1
    small = {"num_hidden_layers": 6 if kind == "gemma3_text" else 1}
    write_gguf(tiny(kind, rows, **small), tokenizer, tmp_path / "m.gguf", "f16", name="tiny")
    texts = ("Hello", "  two  blanks", "Où est\nla gare ?")
    turns = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]
    with llama_cpp(tmp_path / "m.gguf", context=64) as runtime:
        assert runtime.chat_tokens(turns) == ChatTemplate(tokenizer).prompt(turns)


def gemma_tokenizer():
    """Return a small tokenizer with the parts of Gemma's: runs of blanks are added tokens."""
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "▁▁", "▁▁▁", "▁", "a", "b", "▁a"]
    vocabulary += [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", "▁"), ("▁▁", "▁"), ("▁", "a")]
    options = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    ids = {token: number for number, token in enumerate(vocabulary)}
    raw = Tokenizer(models.BPE(ids, merges, **options))
    raw.normalizer = WRITES_BLANKS
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_tokens([AddedToken(token, normalized=False) for token in ("▁▁", "▁▁▁")])
    special = {
        name: f"<{name[:3]}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def test_runs_of_blanks_are_written_as_llama_cpp_takes_them(tmp_path, monkeypatch):
    """It gives the text of an added token as it is. transformers reads such a file too."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    tokenizer = gemma_tokenizer()
    model = tiny("gemma3_text", len(tokenizer), head_dim=256, query_pre_attn_scalar=256)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", name="tiny")
    tokens = GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[4:10] == ["  ", "   ", "▁", "a", "b", "▁a"]
    again = load_tokenizer(ModelSpec(name=str(tmp_path / "m.gguf")))
    for text in ("a b", "a  b", "a   a", "   b  a", "é    b"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert again(text, add_special_tokens=False).input_ids == ids
        assert again.decode(ids) == tokenizer.decode(ids) == text


@pytest.mark.slow
def test_llama_cpp_writes_the_runs_of_blanks_of_gemma(tmp_path, llama_cpp):
    tokenizer = real_tokenizer("gemma3")
    rows = max(tokenizer.get_vocab().values()) + 1
    model = tiny("gemma3_text", rows, num_hidden_layers=6)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f16", name="tiny")
    with llama_cpp(tmp_path / "m.gguf", context=64) as runtime:
        for count in (1, 2, 3, 8, 31, 32, 50):
            text = f"a{' ' * count}b\n{' ' * count}return  "
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert runtime.tokens(text) == tokenizer(text).input_ids
            assert runtime.text(ids) == text


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("smollm2", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("gemma3_text", {"head_dim": 256, "query_pre_attn_scalar": 256}),
    ],
)
def test_our_files_are_read_again(kind, changes, tmp_path, monkeypatch, chat_tokenizer):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    model = tiny(kind, len(chat_tokenizer), **changes)
    write_gguf(model, chat_tokenizer, tmp_path / "m.gguf", "f32", name="tiny")
    again = load_model(ModelSpec(name=str(tmp_path / "m.gguf")))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("llama", r"has the weights blk\.0\.attn_q\.bias and 13 more"),
        ("gemma3_text", "has heads of width 8, and transformers scales .* as for 256"),
    ],
)
def test_our_files_that_transformers_would_read_wrongly_are_refused(
    kind, says, tmp_path, monkeypatch, chat_tokenizer
):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    model = tiny(kind, len(chat_tokenizer))
    write_gguf(model, chat_tokenizer, tmp_path / "m.gguf", "f32", name="tiny")
    with pytest.raises(UserError, match=rf"{says}.*\. Take the model's Hugging Face folder"):
        load_model(ModelSpec(name=str(tmp_path / "m.gguf")))


def test_a_model_without_a_family_is_refused_with_the_list(make_model, chat_tokenizer):
    model = make_model("phi", vocab_size=len(chat_tokenizer))
    with pytest.raises(UserError, match=r"a phi model .* known are llama, mistral, gpt2, gemma3"):
        check_gguf(model, chat_tokenizer)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}, "scaled"),
        ("llama", {"hidden_act": "gelu"}, "has the activation gelu"),
        ("mistral", {"sliding_window": 8}, "a sliding window of 8"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scales its attention by layer"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "soft cap"),
        ("gemma3_text", {"query_pre_attn_scalar": 9}, "by another number"),
        ("gemma3_text", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "layer 6"),
        ("qwen3", {"attention_bias": True}, "biases"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
         "sliding window"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_do_is_refused(kind, changes, reason, chat_tokenizer):
    model = tiny(kind, len(chat_tokenizer), **changes)
    with pytest.raises(UserError, match=rf"{reason}.*\. Leave out --gguf"):
        check_gguf(model, chat_tokenizer)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", "smollm"),
        ("gpt2", "gpt-2"),
        ("qwen3", "qwen2"),
        ("llama3_1", "llama-bpe"),
    ],
)
def test_the_words_of_real_tokenizers_have_a_name(name, expected):
    tree = json.loads(real_tokenizer(name).backend_tokenizer.to_str())
    whole = bool(tree["model"].get("ignore_merges"))
    assert llama_cpp_name(tree["pre_tokenizer"], ignore_merges=whole) == expected


def test_the_demo_s_model_is_given_the_tokens_that_it_was_trained_on():
    """SmolLM2 cuts digits apart before words, so a blank line before a number is one token."""
    tokenizer = real_tokenizer("smollm2")
    assert tokenizer.tokenize("a\n\n42") == ["a", "ĊĊ", "4", "2"]
    assert tokenizer("\n\n1").input_ids[0] == 1116


def test_words_that_llama_cpp_cuts_at_other_places_are_refused():
    """Its gpt-4o does so with combining marks."""
    tree = json.loads(real_tokenizer("gptoss").backend_tokenizer.to_str())
    with pytest.raises(UserError, match=r"no name in llama\.cpp"):
        llama_cpp_name(tree["pre_tokenizer"], ignore_merges=True)


def test_words_without_a_name_are_refused():
    digits = {"type": "Digits", "individual_digits": True}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    both = {"type": "Sequence", "pretokenizers": [digits, bytes_]}
    assert llama_cpp_name(both, ignore_merges=False) == "smollm"
    for odd in ({"type": "Whitespace"}, bytes_ | {"add_prefix_space": True}, None):
        with pytest.raises(UserError, match=r"no name in llama\.cpp .*\. Leave out --gguf"):
            llama_cpp_name(odd, ignore_merges=False)
    with pytest.raises(UserError, match=r"no name in llama\.cpp"):
        llama_cpp_name(bytes_, ignore_merges=True)


@pytest.mark.parametrize(
    ("behavior", "invert", "known"),
    [
        ("Isolated", False, True),
        ("Removed", True, True),
        ("Removed", False, False),
        ("MergedWithPrevious", False, False),
    ],
)
def test_a_pattern_has_a_name_if_its_matches_are_the_words(behavior, invert, known):
    pattern = next(parts[0] for parts, name in PATTERNS.items() if name == "qwen2")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    words = {"type": "Sequence", "pretokenizers": [split, bytes_]}
    if known:
        assert llama_cpp_name(words, ignore_merges=False) == "qwen2"
        return
    with pytest.raises(UserError, match=r"no name in llama\.cpp"):
        llama_cpp_name(words, ignore_merges=False)


def test_a_row_that_is_no_multiple_of_a_block_stays_f16():
    import gguf

    q8 = gguf.GGMLQuantizationType.Q8_0
    assert encoded(torch.randn(4, 64), q8)[1] == q8
    assert encoded(torch.randn(4, 30), q8)[1] == gguf.GGMLQuantizationType.F16
    assert encoded(torch.randn(64), q8)[1] == gguf.GGMLQuantizationType.F32


BLANKS = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
ALWAYS = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
WRITES_BLANKS = normalizers.Replace(" ", "▁")


@pytest.mark.parametrize(
    ("normalizer", "words", "prefix"),
    [
        (None, BLANKS, "first"),
        (None, pre_tokenizers.Sequence([BLANKS]), "first"),
        (None, pre_tokenizers.Sequence([pre_tokenizers.Sequence([ALWAYS])]), "always"),
        (normalizers.Sequence([normalizers.Prepend("▁"), WRITES_BLANKS]), None, "always"),
        (WRITES_BLANKS, pre_tokenizers.Split(" ", "merged_with_previous"), "never"),  # Gemma
        (None, None, None),
        (None, pre_tokenizers.Sequence([BLANKS, pre_tokenizers.Digits(True)]), None),
        (normalizers.Replace("``", "▁"), BLANKS, None),
        (normalizers.Sequence([normalizers.NFKC(), WRITES_BLANKS]), None, None),
    ],
)
def test_the_blank_before_a_text_is_found_or_the_tokenizer_refused(normalizer, words, prefix):
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}
    options = {"unk_token": "<unk>", "byte_fallback": True}
    raw = Tokenizer(models.BPE(vocabulary, [("▁", "a")], **options))
    if normalizer is not None:
        raw.normalizer = normalizer
    if words is not None:
        raw.pre_tokenizer = words
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    if prefix is not None:
        assert read_words(tokenizer).prefix == prefix
        return
    with pytest.raises(UserError, match=r"is not sentencepiece's.*\. Leave out --gguf"):
        read_words(tokenizer)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_rounding_that_is_reported_is_that_of_the_file(kind, tmp_path, chat_tokenizer):
    model = tiny(kind, len(chat_tokenizer))
    write_gguf(model, chat_tokenizer, tmp_path / "m.gguf", "q8_0", name="tiny")
    model.load_state_dict(rounded(model, "q8_0"), strict=False)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    expected = weights_of(model, family_of(model.config))
    assert found.keys() == expected.keys()
    assert any(tensor.tensor_type == GGMLQuantizationType.Q8_0 for tensor in found.values())
    for name, weight in expected.items():
        values = quants.dequantize(found[name].data, found[name].tensor_type)
        assert torch.equal(torch.tensor(values).reshape(weight.shape), weight), name


def rendered(template, messages):
    """Return what Ollama makes of a template of ours: ranges and conditions on roles alone."""
    import re

    system = any(message["role"] == "system" for message in messages)
    head, _, rest = template.partition("{{ range .Messages }}")
    inside = re.fullmatch(r"\{\{ if not \.System \}\}(.*)\{\{ end \}\}", head, re.DOTALL)
    text = ("" if system else inside[1]) if inside else head
    body = rest.removesuffix("{{ end }}{{ end }}")
    pieces = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', body)[1:]
    of_role = dict(zip(pieces[::2], pieces[1::2], strict=True))
    return text + "".join(
        of_role[message["role"]].replace("{{ .Content }}", message["content"])
        for message in messages
    )


@pytest.mark.parametrize(
    ("name", "system"),
    [
        *((name, False) for name in ("CHATML", "DEFAULT_SYSTEM", "ZEPHYR", "GEMMA")),
        *((name, True) for name in ("CHATML", "DEFAULT_SYSTEM", "ZEPHYR")),  # Gemma takes none
    ],
)
def test_ollama_writes_what_the_chat_template_writes(name, system):
    tokenizer = train_tokenizer(["a few words"], 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = getattr(stock, name)
    turns = [{"role": "system", "content": "Be kind."}] if system else []
    turns += [
        {"role": role, "content": text}
        for role, text in (("user", "Hi"), ("assistant", "Yes"), ("user", "Why?"))
    ]
    template = ollama_template(tokenizer, PLAIN)
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered(template, turns) == asked


def test_a_template_that_rewrites_turns_gets_none():
    tokenizer = train_tokenizer(["a few words"], 300)
    tokenizer.chat_template = stock.THINKING
    assert ollama_template(tokenizer, PLAIN) is None
    text = modelfile("m.gguf", tokenizer, PLAIN, stops=[], parameters={})
    assert text.splitlines()[1].startswith("# The chat template is not one of single turns")


def test_the_modelfile_names_the_file_the_stops_and_the_parameters(chat_tokenizer):
    text = modelfile(
        "m.gguf",
        chat_tokenizer,
        PLAIN,
        stops=["<|im_end|>"],
        parameters={"temperature": 0.0, "num_predict": 64},
        system="Be kind.",
    )
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """')
    assert text.endswith(
        'SYSTEM """Be kind."""\nPARAMETER temperature 0\nPARAMETER num_predict 64\n'
        'PARAMETER stop "<|im_end|>"\n'
    )
    chat_tokenizer.chat_template, kept = None, chat_tokenizer.chat_template
    assert ollama_template(chat_tokenizer, PLAIN) == "{{ .Prompt }}"
    chat_tokenizer.chat_template = kept


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("Be brief.", 'SYSTEM """Be brief."""'),
        ('Say "hi"', 'SYSTEM Say "hi"'),
        ('Say """hi""" now', 'SYSTEM Say """hi""" now'),
        ('Two\nlines with """', "# The system prompt has quotation marks that"),
        ("", "# The training had an empty system message, which Ollama does not write."),
    ],
)
def test_quotation_marks_end_no_text_of_a_modelfile(chat_tokenizer, text, written):
    found = modelfile("m.gguf", chat_tokenizer, PLAIN, stops=["\n"], parameters={}, system=text)
    assert written in found
    assert 'PARAMETER stop """\n"""' in found


def test_a_template_in_the_language_of_ollama_gets_none(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = stock.CHATML.replace("<|im_end|>", "{{ '{{json}}' }}<|im_end|>")
    assert ollama_template(tokenizer, PLAIN) is None


@pytest.mark.parametrize(
    ("normalizer", "allowed"),
    [
        (normalizers.NFC(), True),
        (normalizers.Sequence([normalizers.NFC()]), True),
        (normalizers.Lowercase(), False),
        (normalizers.Sequence([normalizers.NFKC(), normalizers.StripAccents()]), False),
    ],
)
def test_texts_that_are_changed_before_they_are_cut(chat_tokenizer, normalizer, allowed):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizer
    if allowed:
        read_words(tokenizer)
        assert any("NFC" in sentence for sentence in unlike_transformers(tokenizer))
        return
    with pytest.raises(UserError, match="changes texts before it cuts them"):
        read_words(tokenizer)


def test_tokens_with_flags_are_named(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    assert unlike_transformers(tokenizer) == []
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    assert ["<mask>" in sentence for sentence in unlike_transformers(tokenizer)] == [True]


def test_of_several_templates_the_default_is_in_the_file(chat_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = {"default": stock.CHATML, "tool_use": stock.ZEPHYR}
    write_gguf(tiny("llama", len(tokenizer)), tokenizer, tmp_path / "m.gguf", "f32", name="tiny")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == stock.CHATML
    assert fields["tokenizer.chat_template.tool_use"].contents() == stock.ZEPHYR
