"""Trimmed models: rows bit for bit, logits, greedy answers, and every id in the configs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from finetune.errors import UserError
from finetune.inference.generation import GenerationSettings, generate
from finetune.models.describe import token_tables
from finetune.models.trim.model import trim_model
from finetune.models.trim.renumber import renumber_tokenizer, renumbered, without_tokens

KEPT = (1, 3, 5, 7, 20, 33, 50, 60, 61, 62, 80, 96)
KINDS = [
    "gpt2", "llama", "qwen2", "gemma3", "gpt_neox", "phi", "cohere", "granite", "bloom",
]  # fmt: skip
GREEDY = GenerationSettings.greedy(12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_bit_equal_and_the_logits_are_those_of_the_kept_tokens(
    kind, make_model, tmp_path
):
    model = make_model(kind)
    smaller = trim_model(model, KEPT)
    for old, new in zip(token_tables(model), token_tables(smaller), strict=True):
        assert torch.equal(old[list(KEPT)], new)
    places = torch.randint(0, len(KEPT), (3, 11), generator=torch.Generator().manual_seed(0))
    old = model(input_ids=torch.tensor(KEPT)[places]).logits[..., list(KEPT)]
    new = smaller(input_ids=places).logits
    assert (old - new).abs().max() <= 1e-5 * old.abs().max()
    tied = [table is head for table, head in map(token_tables, (model, smaller))]
    assert tied[0] == tied[1] == smaller.config.tie_word_embeddings
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == len(KEPT) == len(token_tables(again)[0])
    torch.testing.assert_close(again(input_ids=places).logits, new)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma3"])
def test_greedy_answers_are_equal_as_long_as_they_stay_in_k(kind, make_model):
    model = make_model(kind)
    prompts = [[1, 3, 5], [7, 50, 60, 61], [96], [80, 33, 1, 1]]
    answers = generate(model, prompts, settings=GREEDY, batch_size=4)
    kept = sorted({token for ids in (*prompts, *answers) for token in ids} | {2, 9})
    assert len(kept) < 60
    places = {old: new for new, old in enumerate(kept)}
    again = generate(
        trim_model(model, kept),
        [[places[token] for token in ids] for ids in prompts],
        settings=GREEDY,
        batch_size=4,
    )
    assert [[kept[token] for token in ids] for ids in again] == answers


def test_every_id_in_the_configs_is_renumbered(make_model):
    model = make_model("gpt2", bos_token_id=1, eos_token_id=[3, 4], pad_token_id=7)
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=[3, 96],
        pad_token_id=7,
        decoder_start_token_id=20,
        suppress_tokens=[2, 5],
        begin_suppress_tokens=[33],
        bad_words_ids=[[5, 7], [5, 8]],
        max_new_tokens=17,
    )
    smaller = trim_model(model, KEPT)
    config, settings = smaller.config, smaller.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, [1], 3)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, [1, 11], 3)
    assert settings.decoder_start_token_id == 4
    assert (settings.suppress_tokens, settings.begin_suppress_tokens) == ([2], [5])
    assert (settings.bad_words_ids, settings.max_new_tokens) == ([[2, 3]], 17)
    assert (model.config.pad_token_id, model.generation_config.eos_token_id) == (7, [3, 96])
    assert smaller(input_ids=torch.tensor([[0, 3, 11]])).logits.shape[-1] == len(KEPT)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("eos_token_id", 5, 1),
        ("eos_token_id", 6, None),
        ("vocab_size", 5, 5),
        ("forced_eos_token_id", [5, 6], [1]),
        ("force_words_ids", [[4, 5], [6]], [[0, 1]]),
        ("sequence_bias", [[[4], 0.5], [[5, 6], 1.0]], [[[0], 0.5]]),
        ("forced_decoder_ids", [[1, 4], [2, 6]], [[1, 0]]),
        ("architectures", ["a"], ["a"]),
    ],
)
def test_the_value_of_a_key(key, value, expected):
    assert renumbered(key, value, {4: 0, 5: 1}) == expected


def test_the_parts_of_a_tokenizer_file():
    tree = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []},
        "added_tokens": [{"id": 3, "content": "<s>"}, {"id": 4, "content": "<gone>"}],
        "padding": {"pad_id": 3, "pad_token": "<s>"},
        "post_processor": {
            "processors": [
                {"type": "RobertaProcessing", "sep": ["<s>", 3], "cls": ["<s>", 3]},
                {"special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}},
                {"type": "ByteLevel"},
            ]
        },
    }
    found = renumber_tokenizer(tree, {"b": 0, "<s>": 1}, [])
    assert found["model"]["vocab"] == {"b": 0}
    assert found["added_tokens"] == [{"id": 1, "content": "<s>"}]
    assert found["padding"]["pad_id"] == 1
    roberta, template, last = found["post_processor"]["processors"]
    assert (roberta["sep"], roberta["cls"], last) == (["<s>", 1], ["<s>", 1], {"type": "ByteLevel"})
    assert template["special_tokens"]["<s>"]["ids"] == [1]
    settings = {
        "eos_token": "<s>",
        "image_token": {"content": "<gone>"},
        "extra_special_tokens": ["<gone>", "<s>"],
        "truncation_side": "left",
        "response_schema": {"type": "<gone>"},
    }
    assert without_tokens(settings, frozenset({"<gone>", "left"})) == {
        "eos_token": "<s>",
        "extra_special_tokens": ["<s>"],
        "truncation_side": "left",
        "response_schema": {"type": "<gone>"},
    }


def test_a_second_table_of_tokens_is_refused(make_model):
    model = make_model("llama")
    model.model.more = torch.nn.Embedding(97, 4)
    with pytest.raises(UserError, match=r"model\.more also has a row for each of the 97 tokens"):
        trim_model(model, KEPT)
