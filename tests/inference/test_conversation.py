"""Conversations and lines of text with a real (random) model."""

import functools
import itertools

import pytest

from finetune.errors import UserError
from finetune.inference.conversation import Conversation
from finetune.inference.generation import GenerationSettings, chunks, generate
from finetune.inference.translation import translate_file, translate_lines
from finetune.models.load import ModelSpec, load_model

SAMPLING = GenerationSettings(
    max_new_tokens=10,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    repetition_penalty=1.0,
    stop_ids=[],
    seed=5,
)


@pytest.fixture(scope="module")
def model():
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config |= {
        "max_position_embeddings": 150,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return load_model(ModelSpec(config=config, vocab_size=320))


def start(model, tokenizer, system_prompt=None):
    notes = []
    return Conversation(
        model, tokenizer, settings=SAMPLING, system_prompt=system_prompt, notify=notes.append
    ), notes


def test_each_answer_is_asked_for_with_all_turns_before_it(model, tokenizer):
    chat, notes = start(model, tokenizer, system_prompt="Ja.")
    first = "".join(chat.reply("one"))
    second = "".join(chat.reply("two"))
    messages = [
        {"role": "system", "content": "Ja."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert second == tokenizer.decode(
        generate(model, [prompt], batch_size=1, settings=SAMPLING)[0], skip_special_tokens=True
    )
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert notes == []
    chat.reset()
    assert "".join(chat.reply("one")) == first


def test_the_oldest_turns_go_when_the_context_is_full_and_a_note_says_so(model, tokenizer):
    chat, notes = start(model, tokenizer)
    for number in range(8):
        assert "".join(chat.reply(f"question {number}"))
        if notes:
            break
    assert notes == [
        "the conversation is longer than the model's 150 tokens: the oldest question and its "
        "answer are left out"
    ]
    *earlier, question, answer = chat.turns  # all of them, to be saved
    assert [turn["content"] for turn in chat.turns[::2]] == [
        f"question {n}" for n in range(number + 1)
    ]
    prompt = tokenizer.apply_chat_template(
        [*earlier[2:], question], add_generation_prompt=True, return_dict=False
    )
    assert answer["content"] == tokenizer.decode(
        generate(model, [prompt], batch_size=1, settings=SAMPLING)[0], skip_special_tokens=True
    )
    chat.undo()
    assert "".join(chat.reply(question["content"])) == answer["content"]
    assert len(notes) == 1


def test_a_message_too_long_by_itself_is_refused_and_nothing_is_lost(model, tokenizer):
    chat, _ = start(model, tokenizer)
    list(chat.reply("one"))
    turns = list(chat.turns)
    with pytest.raises(UserError, match="the model reads 150"):
        list(chat.reply("x y " * 100))
    assert chat.turns == turns


def test_an_answer_broken_off_stays_as_far_as_it_came(model, tokenizer):
    chat, _ = start(model, tokenizer)
    answer = chat.reply("one")
    pieces = list(itertools.islice(answer, 2))
    answer.close()
    assert chat.turns[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert "".join(chat.reply("two"))


def test_a_model_without_turns_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match=r"no chat template.*finetune translate"):
        start(model, tokenizer)


def test_a_template_without_system_prompts_refuses_one(model, tokenizer, monkeypatch):
    turns = (
        "{% for m in messages if m.role != 'system' %}"
        "{{ m.role + m.content + '<|im_end|>' }}{% endfor %}assistant"
    )
    monkeypatch.setattr(tokenizer, "chat_template", turns)
    with pytest.raises(UserError, match="no system prompt"):
        start(model, tokenizer, system_prompt="Be brief.")
    assert "".join(start(model, tokenizer)[0].reply("one"))


@pytest.fixture
def translate(model, tokenizer):
    return functools.partial(
        translate_lines,
        model=model,
        tokenizer=tokenizer,
        prompt_of=lambda text: tokenizer(text)["input_ids"],
        settings=SAMPLING,
        batch_size=2,
    )


def test_lines_keep_their_order_and_blank_ones_stay_empty(translate):
    lines = [
        "one two",
        "",
        "  three four five six \n",
        "\n",
        "Ja.",
    ] * 5  # more than one chunk of 8 batches
    translations = list(translate(lines))
    assert [bool(t) for t in translations] == [bool(line.strip()) for line in lines]
    assert all("\n" not in t for t in translations)
    alone = list(translate(lines[:1]))
    assert translations[0] == alone[0]


def test_a_file_becomes_a_file_with_as_many_lines(tmp_path, translate):
    source, target, seen = tmp_path / "in.txt", tmp_path / "out.txt", []
    source.write_text("Où est le café ?\n\nThe file\nJa.", encoding="utf-8")
    assert (
        translate_file(source, target, translate, on_progress=lambda *counts: seen.append(counts))
        == 4
    )
    assert target.read_text(encoding="utf-8").split("\n")[1] == ""
    assert target.read_text(encoding="utf-8").count("\n") == 4
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_file_has_the_lines_that_wc_counts(tmp_path, translate):
    """A byte order mark is no text, and a lone carriage return ends no line."""
    seen = []

    def kept(lines):
        seen.extend(lines)
        return seen

    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes("\ufeffA\rB\r\n\nC\u2028D\n".encode())
    assert translate_file(source, target, kept) == 3
    assert seen == ["A\rB", "", "C\u2028D"]
    assert target.read_bytes().count(b"\n") == 3


def test_files_that_cannot_be_translated_are_explained(tmp_path, translate):
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    with pytest.raises(UserError, match="No such file"):
        translate_file(source, target, translate)
    source.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        translate_file(source, target, translate)
    with pytest.raises(UserError, match="source itself"):
        translate_file(source, source, translate)
    source.write_text("fine\n\n" + "x y " * 100 + "\nafter\n")
    with pytest.raises(UserError, match=r"^line 3 cannot be translated: .*at most 150"):
        translate_file(source, target, translate)
    assert target.read_text().count("\n") == 2, "the lines before it are translated"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("good", range(8))
def test_what_came_before_a_refused_item_is_not_lost(good, size):
    def items():
        yield from range(good)
        raise UserError("no")

    found, read = [], chunks(items(), size)
    for _ in range(-(-good // size)):
        chunk = next(read)
        assert len(chunk) <= size
        found += chunk
    with pytest.raises(UserError, match="no"):
        next(read)
    assert found == list(range(good))
    assert [each for chunk in chunks(range(good), size) for each in chunk] == list(range(good))
