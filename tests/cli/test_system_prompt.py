"""The system prompt of a run's training is that of its use, and a date that a template prints."""

import json
from datetime import date
from pathlib import Path

import pytest
import yaml

from finetune.recipes.build import material
from tests.cli.conftest import finetune
from tests.conftest import conversation

SYSTEM = "You are Zorg, and you add numbers."
SAID = f"system prompt of the run: {SYSTEM}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs: the prompt from the config, from the data, none, an empty one."""
    from tests.cli.conftest import train_in

    root = tmp_path_factory.mktemp("systems")
    plain = [conversation(n)["messages"] for n in range(24)]
    own = [[{"role": "system", "content": SYSTEM}, *messages] for messages in plain]
    for name, conversations, data in (
        ("config", plain, {"system_prompt": SYSTEM}),
        ("data", own, {}),
        ("none", [*own[:4], *plain[4:]], {}),
        ("empty", [[{"role": "system", "content": ""}, *messages] for messages in plain], {}),
    ):
        (root / name).mkdir()
        path = root / name / "chat.jsonl"
        path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations))
        train_in(
            root / name,
            data={"train": str(path), "validation_fraction": 0.1, "max_length": 96, **data},
            evaluation={"samples": 0, "generate": 0, "before": False},
        )
    return root


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the prompts that the model gets from now on."""
    from finetune.inference import conversation as talking
    from finetune.recipes import generate as generating

    seen: list[str] = []
    generate, stream = generating.generate, talking.stream

    def watched_generate(model, ids, **options):
        seen.extend(map(decode, ids))
        return generate(model, ids, **options)

    def watched_stream(model, tokenizer, ids, settings, **options):
        seen.append(tokenizer.decode(ids))
        yield from stream(model, tokenizer, ids, settings, **options)

    def decode(ids):
        return opened[-1].tokenizer.decode(ids)

    opened = []
    open_target = generating.open_target

    def watched_open(target, **options):
        opened.append(open_target(target, **options))
        return opened[-1]

    monkeypatch.setattr(generating, "open_target", watched_open)
    monkeypatch.setattr(generating, "generate", watched_generate)
    monkeypatch.setattr(talking, "stream", watched_stream)
    return seen


@pytest.mark.parametrize("name", ["config", "data"])
def test_chat_and_generate_take_the_prompt_of_the_training_and_say_so(
    name: str, runs: Path, prompts: list[str]
) -> None:
    run = str(runs / name / "run")
    chat = finetune("chat", run, stdin="Hello\n")
    generate = finetune("generate", run, "--prompt", "Hello")
    assert (chat.code, generate.code) == (0, 0)
    assert SAID in chat.err
    assert SAID in generate.err
    asked = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert prompts == [asked + "<|im_start|>assistant\n"] * 2


@pytest.mark.parametrize("command", [("chat",), ("generate", "--prompt", "Hello")])
def test_another_prompt_or_none_can_be_given(
    command: tuple[str, ...], runs: Path, prompts: list[str]
) -> None:
    name, *rest = command
    for system, begins in (
        ("Be brief.", "<|im_start|>system\nBe brief.<"),
        ("", "<|im_start|>user"),
    ):
        result = finetune(
            name, str(runs / "config" / "run"), *rest, "--system", system, stdin="Hi\n"
        )
        assert result.code == 0
        assert SYSTEM not in result.err
        assert prompts.pop().startswith(begins)


def test_prompts_that_differ_are_nobodys(runs: Path, prompts: list[str]) -> None:
    result = finetune("generate", str(runs / "none" / "run"), "--prompt", "Hello")
    assert result.code == 0
    assert "system prompt" not in result.err
    assert prompts[0].startswith("<|im_start|>user")


def test_an_empty_system_message_of_the_training_is_one_in_use(
    runs: Path, prompts: list[str]
) -> None:
    """Many templates write a text of their own if there is no message."""
    run = str(runs / "empty" / "run")
    chat = finetune("chat", run, stdin="Hello\n")
    generate = finetune("generate", run, "--prompt", "Hello")
    assert (chat.code, generate.code) == (0, 0)
    assert "system prompt of the run: (empty)" in chat.err
    asked = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert prompts == [asked + "<|im_start|>assistant\n"] * 2


def test_a_raw_text_has_no_system_prompt(runs: Path, prompts: list[str]) -> None:
    run = str(runs / "config" / "run")
    assert finetune("generate", run, "--raw", "--prompt", "Hello").code == 0
    assert prompts == ["Hello"]
    refused = finetune("generate", run, "--raw", "--system", "x", "--prompt", "Hello")
    assert refused.code == 2
    assert "Leave out --system or --raw" in refused.err


def test_evaluate_says_the_prompt(runs: Path) -> None:
    result = finetune("evaluate", str(runs / "config" / "run"))
    assert result.code == 0
    assert f"system prompt: {SYSTEM}" in result.err


def test_a_date_in_the_template_is_that_of_the_first_start(
    folder: Path, write_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = folder / "dated.jinja"
    template.write_text(
        "{% set today = strftime_now('%d %b %Y') %}<|im_start|>system\n{{ today }}<|im_end|>\n"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def on(day: date) -> None:
        class Today(date):
            @classmethod
            def today(cls):
                return day

        monkeypatch.setattr(material, "date", Today)

    config = str(write_config(model={"chat_template": str(template)}))
    on(date(2024, 2, 9))
    assert finetune("train", config, "training.max_steps=2").code == 0
    assert yaml.safe_load((folder / "run/config.yaml").read_text())["data"]["template_date"] == (
        "2024-02-09"
    )
    on(date(2024, 2, 10))
    assert "09 Feb 2024" in finetune("inspect", "run/config.yaml").out
    assert "10 Feb 2024" in finetune("inspect", config).out
    resumed = finetune("train", config, "training.max_steps=4", "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "template_date" not in resumed.err
    assert yaml.safe_load((folder / "run/config.yaml").read_text())["data"]["template_date"] == (
        "2024-02-09"
    )
