"""Tokenizers trained, loaded, and made ready for chat, with an end of turn that survives saving."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from finetune.errors import UserError
from finetune.models import tokenizers
from finetune.models.load import ModelSpec, load_model
from finetune.models.tokenizers import (
    CHATML,
    end_of_turn,
    fit_to_tokenizer,
    load_tokenizer,
    set_template,
    train_tokenizer,
)
from finetune.recipes.build.vocabulary import active_ids

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def test_a_trained_tokenizer_encodes_anything_and_comes_back_from_disk(chat_tokenizer, tmp_path):
    text = "Ünïcödé 🙂\n\ttabs  and spaces "
    assert chat_tokenizer.decode(chat_tokenizer(text).input_ids) == text
    assert len(chat_tokenizer) <= 300
    chat_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == chat_tokenizer(text).input_ids
    assert (again.eos_token, again.pad_token, again.chat_template) == (
        "<|im_end|>",
        "<|endoftext|>",
        CHATML,
    )
    assert again("<|im_end|>").input_ids == [again.eos_token_id]


def test_training_a_tokenizer_twice_gives_the_same_one():
    texts = ["one two three two one", "three three four"]
    assert (
        train_tokenizer(iter(texts), 290).get_vocab()
        == train_tokenizer(iter(texts), 290).get_vocab()
    )


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(
        UserError, match="vocab_size is 100; a byte-level tokenizer needs at least 259"
    ):
        train_tokenizer(["text"], 100)


def test_chatml_renders_turns_and_the_prompt(chat_tokenizer):
    text = chat_tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert (
        text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chatml_on_a_base_model_stops_at_the_end_of_a_turn_after_saving(
    make_model, base_tokenizer_folder, tmp_path
):
    tokenizer = load_tokenizer(ModelSpec(name=str(base_tokenizer_folder)))
    assert tokenizer.chat_template is None
    rows = len(tokenizer)
    model = make_model("gpt2", vocab_size=rows)
    old = model.get_input_embeddings().weight.detach().clone()
    tokens = set_template(tokenizer, "chatml")
    fit_to_tokenizer(model, tokenizer, tokens)
    added = list(tokens.added)
    table = model.get_input_embeddings().weight
    assert (
        added == [rows, rows + 1] == tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    )
    assert table is model.get_output_embeddings().weight
    assert table.shape[0] == model.config.vocab_size == rows + 2
    assert torch.equal(table[:rows], old)
    torch.testing.assert_close(table[rows:].detach(), old.mean(0).expand(2, -1))
    assert tokenizer.pad_token is not None

    with torch.no_grad():  # a model that always says the end of turn
        model.get_input_embeddings().weight[added[1]] *= 100
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.get_input_embeddings().weight[added[1]])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    prompt = tokenizer.apply_chat_template(
        TURNS[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert output[0, prompt["input_ids"].shape[1] :].tolist() == [added[1]]
    assert (tokenizer.eos_token_id, model.config.eos_token_id) == (added[1], added[1])
    assert model.generation_config.eos_token_id == [
        added[1],
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    ]
    assert set_template(tokenizer).added == ()  # nothing is left to do


def test_an_untied_head_gets_new_rows_too(make_model, base_tokenizer_folder):
    tokenizer = load_tokenizer(ModelSpec(name=str(base_tokenizer_folder)))
    model = make_model("gpt_neox", vocab_size=len(tokenizer))
    tokens = set_template(tokenizer, "chatml")
    fit_to_tokenizer(model, tokenizer, tokens)
    added = list(tokens.added)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not table
    for weight in (head, table):
        assert weight.shape[0] == added[-1] + 1
        torch.testing.assert_close(weight[added[0]].detach(), weight[: added[0]].detach().mean(0))


def test_a_padded_table_is_never_shrunk_and_its_spare_rows_are_used(
    make_model, base_tokenizer_folder
):
    tokenizer = load_tokenizer(ModelSpec(name=str(base_tokenizer_folder)))
    rows = len(tokenizer) + 30
    model = make_model("qwen2", vocab_size=rows)
    table = model.get_input_embeddings().weight
    old = table.detach().clone()
    tokens = set_template(tokenizer, "chatml")
    fit_to_tokenizer(model, tokenizer, tokens)
    added = list(tokens.added)
    assert model.get_input_embeddings().weight is table
    assert model.config.vocab_size == rows
    torch.testing.assert_close(table[added].detach(), old[: added[0]].mean(0).expand(2, -1))
    assert torch.equal(table[added[-1] + 1 :], old[added[-1] + 1 :])


def test_without_a_template_the_end_of_text_stays_the_stop(make_model, base_tokenizer_folder):
    tokenizer = load_tokenizer(ModelSpec(name=str(base_tokenizer_folder)))
    model = make_model("llama", vocab_size=len(tokenizer))
    tokens = set_template(tokenizer)
    fit_to_tokenizer(model, tokenizer, tokens)
    assert tokens.added == ()
    assert tokenizer.chat_template is None
    assert (
        model.generation_config.eos_token_id
        == model.config.eos_token_id
        == tokenizer.pad_token_id
        == 0
    )


def test_a_stop_token_beyond_a_gap_of_the_vocabulary_stays(make_model):
    """An id may be above the number of tokens."""
    raw = Tokenizer(models.BPE({"a": 0, "<end>": 7}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="a")
    model = make_model("llama", vocab_size=12)
    model.generation_config.eos_token_id = [7, 9]
    fit_to_tokenizer(model, tokenizer, set_template(tokenizer))
    assert model.generation_config.eos_token_id == [0, 7]


def test_preparing_the_tokenizer_alone_adds_the_same_tokens(base_tokenizer_folder):
    tokenizer = load_tokenizer(ModelSpec(name=str(base_tokenizer_folder)))
    assert len(set_template(tokenizer, "chatml").added) == 2
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}",
            "<|im_end|>",
        ),
        (
            "{% for m in messages %}[{{ m.role }}] {{ m.content }} <|endoftext|>\n{% endfor %}",
            "<|endoftext|>",
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    ],
)
def test_the_end_of_turn_is_read_off_the_template(template, expected):
    tokenizer = train_tokenizer(["some text"], 280)
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == expected


def test_a_template_from_a_file_sets_its_own_end_of_turn(tmp_path):
    tokenizer = train_tokenizer(["some text"], 280)
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    set_template(tokenizer, str(file))
    assert (tokenizer.chat_template, tokenizer.eos_token) == (file.read_text(), "<|endoftext|>")
    file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    set_template(tokenizer, str(file))
    assert tokenizer.chat_template.startswith("{% for"), "a byte order mark is no text"


def test_a_missing_or_failing_template_is_explained(tmp_path):
    tokenizer = train_tokenizer(["some text"], 280)
    with pytest.raises(
        UserError, match=r"'nowhere.jinja' is neither .chatml. nor a file that can be read"
    ):
        set_template(tokenizer, "nowhere.jinja")
    with pytest.raises(UserError, match=r"'~no such user\.jinja' is neither"):
        set_template(tokenizer, "~no such user.jinja")
    (tmp_path / "bad.jinja").write_text("{{ messages[7].content.nothing }}")
    with pytest.raises(
        UserError, match="the chat template fails to render a question and its answer"
    ):
        set_template(tokenizer, str(tmp_path / "bad.jinja"))
    (tmp_path / "worse.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="fails to render"):
        set_template(tokenizer, str(tmp_path / "worse.jinja"))


def test_a_tokenizer_written_in_python_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="is ByT5Tokenizer, which is written in Python"):
        load_tokenizer(ModelSpec(name=str(tmp_path)))


@pytest.mark.parametrize("longest", ["x", [1]])
def test_a_longest_text_that_is_no_number_is_refused(chat_tokenizer, tmp_path, longest):
    chat_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": longest}))
    with pytest.raises(UserError, match=r"model_max_length in the tokenizer_config\.json of .* is"):
        load_tokenizer(ModelSpec(name=str(tmp_path)))


def test_a_model_without_a_tokenizer_is_explained(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the tokenizer of .* could not be loaded"):
        load_tokenizer(ModelSpec(name=str(tmp_path)))


NO_SYSTEM = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>bot{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (CHATML, ["system", "user", "assistant"]),
        (NO_SYSTEM, ["user", "assistant", "bot"]),
        (None, []),
    ],
    ids=["chatml", "no system turns", "no template"],
)
def test_the_words_of_the_template_are_active_whatever_the_data(template, roles):
    words = ["system", "user", "assistant", "bot"]
    tokenizer = train_tokenizer([f"{word}\nsome text" for word in words] * 9, 340)
    tokenizer.chat_template = template
    ids = {word: tokenizer(word).input_ids for word in words}
    assert all(len(found) == 1 for found in ids.values())
    active = active_ids(tokenizer, [], ())
    assert [word for word in words if ids[word][0] in active] == roles


IN_EACH = {
    "_from_model_config",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "transformers_version",
}


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature", "top_p"}),
        ({"num_beams": 1, "early_stopping": True}, {"early_stopping"}),
        ({"output_scores": True}, {"output_scores"}),
        ({"top_k": 50, "typical_p": 0.2}, {"typical_p"}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, set()),
        ({"num_beams": 4, "early_stopping": True, "repetition_penalty": 1.1}, set()),
    ],
)
def test_generation_settings_that_cannot_be_saved_are_left_out_at_the_start(
    settings, left_out, chat_tokenizer, tmp_path, caplog
):
    """transformers loads a model with each of these, and writes it only while it is unchanged."""
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    load_model(ModelSpec(config=config, vocab_size=len(chat_tokenizer))).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 2}))
    model = load_model(ModelSpec(name=str(tmp_path)))
    with caplog.at_level("WARNING", "finetune"):
        fit_to_tokenizer(model, chat_tokenizer, set_template(chat_tokenizer))
    model.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    right = GenerationConfig(**{key: settings[key] for key in settings if key not in left_out})
    again = GenerationConfig.from_pretrained(tmp_path / "again")
    for key in {*settings, *kept} - IN_EACH:
        assert getattr(again, key) == getattr(right, key)
    assert again.eos_token_id == 2
    assert all(key in caplog.text for key in left_out)
    assert bool(caplog.text) == bool(left_out)


def test_a_chat_template_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizers, "RENDERING", 0.3)
    tokenizer = train_tokenizer(["a text"] * 3, 300)
    tokenizer.chat_template = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
    with pytest.raises(UserError, match=r"fails to render .*: it takes longer than 0\.3 seconds"):
        set_template(tokenizer)
