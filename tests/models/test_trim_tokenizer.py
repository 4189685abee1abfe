"""Trimmed tokenizers against the whole ones, on real vocabularies of every kind of BPE."""

import functools
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.errors import UserError
from finetune.models.tokenizers import byte_tokens
from finetune.models.trim.keep import bpe_of, frequent_tokens, needed_tokens, tokens_of_texts
from finetune.models.trim.merges import read_bpe
from finetune.models.trim.tokenizer import trim_tokenizer
from tests.vocabularies import real_tokenizer

KINDS = [  # byte level; with NFC; every word a token (ignore_merges); byte fallback
    "smollm2",
    "gpt2",
    pytest.param("qwen3", marks=pytest.mark.slow),
    pytest.param("llama3_1", marks=pytest.mark.slow),
    pytest.param("gptoss", marks=pytest.mark.slow),
    "llama2",
    pytest.param("gemma3", marks=pytest.mark.slow),
]
CORPUS = [
    "The file could not be saved. Please try again in 15 minutes, or call 0800-1234.",
    "Le fichier n'a pas pu être enregistré. Veuillez réessayer dans 15 minutes.",
    "def add(a, b):\n    return a + b  # the sum\n\n\tprint(add(1, 2))",
    "Straße, Übergröße, ﬁn, naïve café — 100 % «sûr» … 🙂🇫🇷 안녕 世界",
]
OTHERS = [
    "Quarks and leptons: unmistakably heterogeneous phenomena, 31415926535.",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, 日本語, 한국어 <0x41> \u0000\u200d",
    "  leading, trailing  \r\n\t\t mixed \u00a0 blanks\u3000",
]


@functools.cache
def pair(name):
    """Return a tokenizer and its trimmed one, with the tokens of CORPUS and 500 frequent ones."""
    whole = real_tokenizer(name)
    keep = needed_tokens(whole) | tokens_of_texts(whole, CORPUS)
    return whole, trim_tokenizer(whole, keep | frequent_tokens(bpe_of(whole), 500))


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=True, verbose=False).input_ids


def check(name, text):
    """Assert what holds for any text; return whether it is one of the kept tokens."""
    whole, trimmed = pair(name)
    old, new = encoded(whole, text), encoded(trimmed.tokenizer, text)
    assert trimmed.tokenizer.decode(new) == whole.decode(old)
    within = set(old) <= trimmed.new_ids.keys()
    if within:
        assert [trimmed.kept[token] for token in new] == old
    return within


@pytest.mark.parametrize("name", KINDS)
def test_the_texts_that_were_kept_encode_the_same_and_the_table_is_small(name):
    whole, trimmed = pair(name)
    assert all(check(name, text) for text in CORPUS)
    assert sum(check(name, text) for text in OTHERS) < len(OTHERS)
    assert len(trimmed.tokenizer) == len(trimmed.kept) < len(whole) / 4
    assert list(trimmed.kept) == sorted(trimmed.kept)
    assert len(byte_tokens(trimmed.tokenizer)) == len(byte_tokens(whole)) > 230


@pytest.mark.parametrize("name", KINDS)
def test_any_text_of_kept_tokens_encodes_the_same(name):
    """The texts are kept tokens in a row, as they are written and with what joins them."""
    whole, trimmed = pair(name)
    within = 0

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(0, len(trimmed.kept) - 1), min_size=1, max_size=12), st.booleans())
    def property(places, blanks):
        nonlocal within
        ids = [trimmed.kept[place] for place in places]
        pieces = [whole.decode([i], skip_special_tokens=True) for i in ids]
        within += check(name, " ".join(pieces) if blanks else whole.decode(ids))

    property()
    assert within > 5  # a property that is not empty


@pytest.mark.parametrize("name", KINDS)
def test_any_text_decodes_to_what_it_was(name):
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(words()), max_size=8)))
    def property(drawn):
        text = drawn if isinstance(drawn, str) else "".join(drawn)
        check(name, text)
        if name == "gpt2":  # the others change some texts or lack some bytes, trimmed or not
            trimmed = pair(name)[1].tokenizer
            assert trimmed.decode(encoded(trimmed, text)) == text

    property()


def words():
    parts = [word for text in CORPUS + OTHERS for word in text.split(" ")]
    return [*parts, *(" " + part for part in parts), " ", "\n", "  "]


@pytest.mark.parametrize("name", ["smollm2", "llama2"])
def test_a_saved_tokenizer_is_the_same_and_keeps_its_special_tokens(name, tmp_path):
    whole, trimmed = pair(name)
    trimmed.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*CORPUS, *OTHERS, "".join(map(str, whole.all_special_tokens))]:
        assert encoded(again, text) == encoded(trimmed.tokenizer, text)
    assert again.all_special_tokens == whole.all_special_tokens
    assert again.chat_template == whole.chat_template
    assert again.bos_token == whole.bos_token
    for token in whole.get_added_vocab():
        assert trimmed.kept[again.convert_tokens_to_ids(token)] == whole.get_vocab()[token]


def test_a_token_without_a_row_goes():
    whole, _ = pair("smollm2")
    added = real_tokenizer("smollm2")
    added.add_tokens(["<image>"])
    trimmed = trim_tokenizer(added, needed_tokens(added), rows=len(whole))
    assert "<image>" not in trimmed.tokenizer.get_vocab()
    assert max(trimmed.kept) < len(whole)


@pytest.mark.parametrize("name", ["smollm2", "llama2"])
def test_a_derivation_is_what_the_tokenizer_does_with_the_token_alone(name):
    bpe = bpe_of(real_tokenizer(name))
    model = models.BPE(vocab=dict(bpe.ids), merges=list(bpe.ranks), byte_fallback=bpe.byte_fallback)
    made = 0
    for token in random.Random(0).sample(sorted(bpe.ids), 400):
        characters, merges = bpe.derive(token)
        pieces = [piece.value for piece in model.tokenize(token)]
        assert len(pieces) == len(characters) - len(merges)
        if len(pieces) == 1:
            made += 1
            assert pieces == [token]
            assert not merges or "".join(merges[-1]) == token
    assert made > 300


def test_the_closure_of_a_token_has_its_parts_and_nothing_else():
    tree = {
        "type": "BPE",
        "vocab": {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc", "cab", "abcab"])},
        "merges": [["a", "b"], ["ab", "c"], ["c", "ab"], ["b", "c"], ["a", "bc"], ["abc", "ab"]],
    }
    bpe = read_bpe(tree)
    assert bpe.derive("abc") == (["a", "b", "c"], [("a", "b"), ("ab", "c")])
    kept = bpe.closed(["abc"])
    assert kept == {"a", "b", "c", "ab", "abc"}
    assert bpe.merges_within(kept) == [("a", "b"), ("ab", "c")]
    # "bc" is kept for itself, and then the other way to "abc" is kept too, in its old place
    both = bpe.closed(["abc", "bc"])
    assert bpe.merges_within(both) == [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]
    assert bpe.most_frequent(3) == ["ab", "abc", "cab"]


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordPiece"),
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), "Unigram"),
        (models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordLevel"),
        (models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"), "end_of_word_suffix"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(model, kind):
    raw = Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=rf"the tokenizer .*{kind}.*\. Export without --trim"):
        trim_tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw), [0])


def test_every_file_of_the_tokenizer_has_the_new_numbers(tmp_path):
    """The post-processor, the padding and the added tokens."""
    whole, trimmed = pair("llama2")
    trimmed.tokenizer.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = trimmed.tokenizer.get_vocab()
    special = tree["post_processor"]["special_tokens"]
    assert {name: each["ids"] for name, each in special.items()} == {"<s>": [ids["<s>"]]}
    assert {each["content"]: each["id"] for each in tree["added_tokens"]} == {
        token: ids[token] for token in ("<unk>", "<s>", "</s>")
    }
    assert whole.get_vocab().keys() > ids.keys()
