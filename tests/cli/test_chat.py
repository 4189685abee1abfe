"""The commands of `finetune chat`, typed into a pipe."""

import json

import pytest

from tests.cli.conftest import finetune


def chat(run, *lines, options=()):
    result = finetune("chat", str(run), *options, stdin="\n".join(lines) + "\n")
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def run(finished):
    return finished / "run"


def test_help_names_every_command(run):
    from finetune.recipes.chat import COMMANDS

    shown = chat(run, "/help").err
    assert all(f"/{name}" in shown for name in COMMANDS)


def test_an_unknown_command_is_refused_and_the_chat_goes_on(run):
    result = chat(run, "/rest", "/reset now", "Hello?")
    assert "there is no command /rest; known are /help, /system" in result.err
    assert "Did you mean 'reset'?" in result.err
    assert "/reset takes no text, but 'now' follows it" in result.err
    assert len(result.out.splitlines()) >= 1  # the answer to Hello?


def test_quiet_shows_refusals_and_what_commands_print(run):
    shown = chat(run, "/rest", "/temperature 2", "/undo", "Hello?", options=["-q"]).err
    assert [line.partition(";")[0] for line in shown.splitlines()] == [
        "there is no command /rest",
        "(temperature 2)",
        "there is no question to undo",
    ]


def test_what_is_said_and_undone_is_what_is_saved(run, tmp_path):
    target = tmp_path / "talk.jsonl"
    chat(
        run, "One?", "Two?", "/undo", "/system Be kind.", "Three?", "/retry", f"/save {target}",
        "/reset", "Four?", f"/save {target}",
        options=["--temperature", "2", "--max-new-tokens", "8"],
    )  # fmt: skip
    first, second = (json.loads(line)["messages"] for line in target.read_text().splitlines())
    assert [m["content"] for m in first if m["role"] != "assistant"] == [
        "Be kind.", "One?", "Three?",
    ]  # fmt: skip
    assert [m["content"] for m in second if m["role"] == "user"] == ["Four?"]


def test_a_conversation_that_was_saved_can_be_trained_on(run, tmp_path):
    target = tmp_path / "talk.jsonl"
    drawn = ["--temperature", "2", "--max-new-tokens", "8"]  # greedy, the tiny model is silent
    chat(run, "One?", "Two?", f"/save {target}", options=drawn)
    target.write_text(target.read_text().rstrip("\n"))  # as an editor may leave it
    chat(run, "One?", f"/save {target}", options=drawn)
    assert [set(json.loads(line)) for line in target.read_text().splitlines()] == [{"messages"}] * 2
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {config: {model_type: llama}, tokenizer: {vocab_size: 300}}\n"
        f"data: {{train: {target}, validation_fraction: 0}}\n"
    )
    assert finetune("inspect", str(config)).code == 0


def test_nothing_to_undo_retry_or_save(run):
    shown = chat(run, "/undo", "/retry", "/save x.jsonl", "/save", "/temperature hot").err
    for sentence in (
        "there is no question to undo",
        "there is no question to answer anew",
        "there is nothing to save yet",
        "/save needs the name of a file",
        "the temperature is 'hot', but must be from 0 to 100",
    ):
        assert sentence in shown


def test_a_file_to_save_to_may_begin_with_a_tilde(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat(run, "One?", "/save ~no such user.jsonl", options=["--temperature", "2"])
    assert (tmp_path / "~no such user.jsonl").is_file()


def test_a_new_temperature_and_a_retry_draw_anew(run):
    lines = ["/temperature 2", "Hello?", "/retry", "/retry", "/retry"]
    answers = chat(run, *lines, options=["--max-new-tokens", "8"]).out
    assert len(set(answers.splitlines())) > 1


def test_a_base_that_was_random_is_refused(run):
    result = finetune("chat", str(run), "--base", stdin="")
    assert result.code == 2
    assert "the run began with random weights" in result.err


def test_a_base_and_a_checkpoint_of_a_run_with_flash_attention_are_read_without_it(
    base, write_config
):
    """It takes 16 bits, a GPU and a package: the weights here are float32."""
    write_config(model={"name": str(base), "config": None, "tokenizer": None})
    assert finetune("train", "c.yaml").code == 0
    config = base.parent / "run" / "config.yaml"
    changed = config.read_text().replace("tation: sdpa", "tation: flash_attention_2")
    assert "flash_attention_2" in changed
    config.write_text(changed)
    chat("run", "Hello?", options=["--base"])
    checkpoint = sorted((base.parent / "run" / "checkpoints").iterdir())[-1]
    result = finetune("export", "run", "out", "--checkpoint", str(checkpoint))
    assert result.code == 0, result.err


def test_turns_that_the_context_has_no_room_for_are_saved_too(run, tmp_path, monkeypatch):
    from finetune.display import Display
    from finetune.inference import conversation
    from finetune.recipes.build.target import open_target
    from finetune.recipes.chat import _conversation, _Session

    prompts = []

    def stream(model, tokenizer, prompt, settings, **_):
        prompts.append(tokenizer.decode(prompt))
        yield "Yes."

    monkeypatch.setattr(conversation, "stream", stream)
    opened, display = open_target(str(run)), Display(enabled=False)
    session = _Session({"": _conversation(opened, None, 0, {}, display)}, display)
    questions, target = [f"Number {n}?" for n in range(20)], tmp_path / "talk.jsonl"
    for line in (*questions, f"/save {target}"):
        assert session.take(line)
    assert questions[0] not in prompts[-1]
    assert questions[-1] in prompts[-1]
    (saved,) = map(json.loads, target.read_text().splitlines())
    assert [m["content"] for m in saved["messages"] if m["role"] == "user"] == questions


def test_an_answer_without_words_is_an_answer_too(run, tmp_path, monkeypatch):
    """What is undone or asked anew is the last question, with one model and with two."""
    from finetune.display import Display
    from finetune.inference import conversation
    from finetune.recipes.build.target import open_target
    from finetune.recipes.chat import _conversation, _Session

    asked = []

    def stream(model, tokenizer, prompt, settings, **_):
        text = tokenizer.decode(prompt)
        asked.append([name for name in ("One?", "Two?") if name in text])
        yield from [" ", "\n"] if "Two?" in text else ["Yes."]

    monkeypatch.setattr(conversation, "stream", stream)
    opened, display = open_target(str(run)), Display(enabled=False)
    talks = {name: _conversation(opened, None, 0, {}, display) for name in ("before", "after")}
    session, target = _Session(talks, display), tmp_path / "talk.jsonl"
    for line in ("One?", "Two?", "/retry", f"/save {target}", "/undo", "/retry"):
        assert session.take(line)
    both = [["One?"], ["One?", "Two?"], ["One?", "Two?"], ["One?"]]
    assert asked == [each for each in both for _ in talks]
    (saved,) = map(json.loads, target.read_text().splitlines())
    assert [m["content"] for m in saved["messages"]] == ["One?", "Yes."]
    assert [len(talk.turns) for talk in talks.values()] == [2, 2]
