"""Each command does what its help says: only results on stdout, progress on stderr."""

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.cli import app
from finetune.config import load_config
from finetune.display import Display
from finetune.optim import list_optimizers
from finetune.recipes.build.target import open_target
from finetune.recipes.generate import answers_of
from finetune.recipes.inspect import inspect_data
from finetune.run.folder import RunDir
from finetune.run.records import read_samples
from tests.cli.conftest import finetune, snapshot
from tests.conftest import LLAMA, conversation

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "init",
    "keys",
    "runs",
    "train",
    "demo",
    "inspect",
    "plan",
    "compare",
    "tune",
    "evaluate",
    "generate",
    "chat",
    "translate",
    "serve",
    "report",
    "export",
    "push",
    "optimizers",
    "landscape",
]
HEAVY = ["torch", "transformers", "datasets", "accelerate", "peft", "matplotlib", "sacrebleu"]


@pytest.fixture
def chat_run(finished, folder) -> Path:
    """Return the working directory, with a copy of the run on conversations."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def translation_run(translator, folder) -> Path:
    shutil.copytree(translator, folder, dirs_exist_ok=True)
    return folder


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
        "COLUMNS": "120",
        "LINES": "40",
    }


def in_a_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], env=environment(), capture_output=True, text=True, timeout=120
    )


def on_a_terminal(
    *arguments: str, replies: Callable[[str], str | None] = lambda shown: None
) -> tuple[int, str]:
    """Run `finetune ARGUMENTS` on a pseudo-terminal; return the exit code and what it showed.

    `replies` returns what to type next, or None.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
    )
    os.close(theirs)
    shown, end = b"", time.monotonic() + 120
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the other side is closed
                    break
            elif (typed := replies(shown.decode(errors="replace"))) is not None:
                os.write(ours, typed.encode())
        return process.wait(timeout=20), shown.decode(errors="replace")
    finally:
        process.kill()
        os.close(ours)


def assert_plain(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text), ascii(text)


# --- help


def test_help_is_fast_and_imports_nothing_heavy(tmp_path):
    """One process prints the help of the program and of every command."""
    code = f"""
import json, resource, sys
from finetune.cli import main
seconds = []
for arguments in [[], *([command] for command in {COMMANDS!r})]:
    sys.argv = ["finetune", *arguments, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 0, stop.code
    seconds.append(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
print(json.dumps([seconds[0], sorted(set({HEAVY!r}) & set(sys.modules))]), file=sys.stderr)
"""
    done = in_a_process("-c", code)
    assert done.returncode == 0, done.stderr
    first, heavy = json.loads(done.stderr)
    assert heavy == []
    assert first < 0.5
    assert_plain(done.stdout)
    for command in COMMANDS:
        assert f"Usage: finetune {command}" in done.stdout
    assert "chat|translation" in done.stdout
    assert "--short" in done.stdout


def test_the_version():
    assert finetune("--version").out == f"finetune {version('finetune-rows')}\n"


def test_every_command_is_known_here():
    assert sorted(command.callback.__name__ for command in app.registered_commands) == sorted(
        COMMANDS
    )
    assert len(COMMANDS) == 19


def test_the_bare_command_and_the_module_show_the_help():
    assert finetune().out == finetune("--help").out != ""
    module = in_a_process("-m", "finetune", "--help").stdout
    assert "Usage: finetune [OPTIONS] COMMAND" in module
    assert [command for command in COMMANDS if f"│ {command} " not in module] == []


# --- train


def test_train_shows_two_held_out_prompts_before_and_after(chat_run):
    changes = ("evaluation.before=true", "evaluation.samples=3", "training.max_steps=1")
    done = finetune("train", "c.yaml", "output_dir=shown", *changes)
    assert done.code == 0
    lines = done.err.splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("  before:")]
    assert len(places) == 2
    samples, _ = read_samples(RunDir(chat_run / "shown"))
    for place, sample in zip(places, [s for s in samples if s.step == 1]):
        assert lines[place + 1].startswith("  after:")
        assert " ".join(sample.reference.split())[:40] in lines[place + 2]


def test_a_prompt_without_its_option_is_told_how_to_give_it(chat_run):
    result = finetune("generate", "run", "Who are you?")
    assert result.code == 2
    assert "(Who are you?). Give a prompt as --prompt TEXT" in result.err


@pytest.mark.slow
def test_train_in_a_pipe_writes_plain_lines_and_results_to_files(chat_run):
    done = in_a_process("-W", "error", "-m", "finetune", "train", "c.yaml", "output_dir=other")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert_plain(done.stderr)
    assert "training 2/2  loss" in done.stderr
    assert "Try the model:    finetune chat other" in done.stderr
    assert len(done.stderr.splitlines()) < 24
    assert {path.name for path in (chat_run / "other").iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "model",
    }


@pytest.mark.slow
def test_train_on_a_terminal_shows_nested_bars(chat_run):
    code, shown = on_a_terminal(
        *("train", "c.yaml", "output_dir=other", "training.max_steps=4"),
        *("evaluation.every=1", "evaluation.before=true"),
    )
    assert code == 0, shown
    assert "Traceback" not in shown
    assert "\x1b[" in shown  # drawn in place
    for label in (
        "training",
        "evaluating the loss",
        "generating",
        "loss",
        "tokens/s",
        "left",
        "report: other/report.html",
    ):
        assert label in shown, label


@pytest.mark.slow
def test_accelerate_launch_trains_too(chat_run):
    options = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--cpu",
    ]
    script = str(ROOT / "scripts" / "train.py")
    done = in_a_process(
        "-m",
        "accelerate.commands.launch",
        *options,
        script,
        "c.yaml",
        "output_dir=other",
        "training.max_steps=1",
    )
    assert done.returncode == 0, done.stderr
    assert (chat_run / "other" / "model" / "model.safetensors").is_file()


def test_a_dry_run_prints_the_resolved_config_alone(chat_run):
    before = snapshot(chat_run)
    result = finetune("train", "c.yaml", "output_dir=other", "--dry-run")
    assert result.code == 0
    (chat_run / "again.yaml").write_text(result.out)
    again = finetune("train", "again.yaml", "--dry-run")
    assert again.out == result.out
    assert "everything is in order: 2 steps" in again.err
    (chat_run / "again.yaml").unlink()
    assert snapshot(chat_run) == before


def test_a_dry_run_looks_at_the_folder_too(chat_run):
    before = snapshot(chat_run)
    taken = finetune("train", "c.yaml", "output_dir=c.yaml", "--dry-run")
    assert taken.code == 2
    assert "the folder c.yaml cannot be written" in taken.err
    held = finetune("train", "c.yaml", "output_dir=run", "--dry-run")
    assert held.code == 0
    assert "run holds a run, which --resume auto would continue" in held.err
    assert snapshot(chat_run) == before


# --- commands on a run


def test_evaluate_prints_json_alone_and_keeps_it(chat_run):
    result = finetune("evaluate", "run")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    kept = json.loads((chat_run / "run" / "evaluation.json").read_text())
    assert kept["test"] == found
    assert found["loss"] == pytest.approx(kept["after"]["loss"], abs=1e-5)
    before = snapshot(chat_run)
    other = json.loads(finetune("evaluate", "run", "data.validation=chat.jsonl").out)
    assert other["data"] == "data.validation: chat.jsonl"
    assert other["num_records"] == 48
    assert other["num_target_tokens"] > found["num_target_tokens"]
    plain = json.loads(finetune("evaluate", "run/model", "--config", "c.yaml").out)
    assert plain["loss"] == pytest.approx(found["loss"])
    assert snapshot(chat_run) == before  # on other data, or another model, nothing is kept


def test_evaluate_reads_all_records_of_the_test_data(chat_run):
    held_out = json.loads(finetune("evaluate", "run", "data.max_validation_records=2").out)
    tested = json.loads(
        finetune("evaluate", "run", "data.max_validation_records=2", "data.test=chat.jsonl").out
    )
    assert (held_out["num_records"], tested["num_records"]) == (2, 48)


def test_a_demo_is_not_written_over_a_run_that_was_named(chat_run):
    before = snapshot(chat_run)
    result = finetune("demo", "chat", "--short", "--output-dir", "run")
    assert (result.code, result.out) == (2, "")
    assert "run holds a run already. Name another --output-dir, or delete it" in result.err
    assert snapshot(chat_run) == before


def test_evaluate_a_translator(translation_run):
    found = json.loads(finetune("evaluate", "run").out)
    assert {"loss", "perplexity", "bits_per_byte", "chrf", "bleu", "chrf_signature"} <= found.keys()
    assert found["num_generated"] == 4


def test_prompts_that_leave_no_room_for_an_answer_are_passed_over(folder, write_config):
    """The model reads 128 tokens: the longest of the held-out questions would fill them."""
    long = {
        "messages": [
            {"role": "user", "content": "why " * 200},
            {"role": "assistant", "content": "So."},
        ]
    }
    (folder / "held.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (long, conversation(3), conversation(4)))
    )
    write_config(
        data={"validation": "held.jsonl"},
        training={"max_steps": 1},
        evaluation={"metrics": ["chrf"], "generate": 1},
    )
    trained, evaluated = finetune("train", "c.yaml"), finetune("evaluate", "run")
    for result in (trained, evaluated):
        assert result.code == 0, result.err
        assert "of the held-out prompts 1 were passed over" in result.err
    assert (
        json.loads((folder / "run" / "samples.jsonl").read_text())["prompt"] == "What is 3 plus 3?"
    )
    assert json.loads(evaluated.out)["num_generated"] == 1
    none_left = finetune("train", "c.yaml", "generation.max_new_tokens=120", "output_dir=other")
    assert none_left.code == 2
    assert "lower generation.max_new_tokens, which is 120" in none_left.err.splitlines()[-1]
    assert "training 1/1" not in none_left.err


def test_generate_answers_prompts_and_stdin(chat_run):
    given = finetune(
        "generate",
        "run",
        "--prompt",
        "What is 1 plus 1?",
        "--prompt",
        "What is 2 plus 2?",
        "--max-new-tokens",
        "3",
    )
    assert given.code == 0, given.err
    asked = ["What is 1 plus 1?", "What is 2 plus 2?"]
    lines = finetune(
        "generate", "run", "--max-new-tokens", "3", "--json", stdin="\n".join(asked)
    ).out.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["prompt"] for answer in answers] == asked
    assert given.out == "".join(
        f"> {answer['prompt']}\n{answer['answer']}\n\n" for answer in answers
    )
    sampled = [
        finetune(
            "generate",
            "run",
            "--prompt",
            "Hm?",
            "--temperature",
            "2",
            "--top-k",
            "50",
            "--top-p",
            "0.99",
            "--seed",
            seed,
        ).out
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert (
        finetune("generate", "run", "--prompt", "What", "--raw", "--repetition-penalty", "1.3").code
        == 0
    )


def test_chat_reads_questions_from_a_pipe(chat_run):
    result = finetune(
        "chat",
        "run",
        "--max-new-tokens",
        "3",
        "--system",
        "Be brief.",
        stdin="Hello?\n\n/reset\nAnd now?\n/exit\nnever read\n",
    )
    assert result.code == 0, result.err
    assert "(conversation cleared)" in result.err
    assert not result.out.startswith("> ")  # answers alone
    assert finetune("chat", "run", stdin="").code == 0


@pytest.mark.slow
def test_chat_on_a_terminal(chat_run):
    script = iter(["Hello?\n", "/reset\n", "And now?\n", "/exit\n"])

    def replies(shown: str) -> str | None:
        return next(script, None) if shown.endswith("> ") else None

    code, shown = on_a_terminal("chat", "run", "--max-new-tokens", "3", replies=replies)
    assert code == 0, shown
    assert "Traceback" not in shown
    for text in ("/exit ends it", "> Hello?", "(conversation cleared)", "> And now?", "> /exit"):
        assert text in shown, shown
    assert next(script, None) is None


def test_translate_sentences_stdin_and_files(translation_run):
    sentences = ["The house is small.", "", "Where are you?"]
    (translation_run / "in.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    piped = finetune("translate", "run", stdin="\n".join(sentences) + "\n")
    assert piped.code == 0, piped.err
    assert len(piped.out.splitlines()) == 3
    assert piped.out.splitlines()[1] == ""
    assert (
        finetune("translate", "run", sentences[0], sentences[2]).out.splitlines()
        == piped.out.splitlines()[::2]
    )
    assert finetune("translate", "run", "--input", "in.txt").out == piped.out
    written = finetune("translate", "run", "-i", "in.txt", "-o", "out.txt")
    assert (written.code, written.out) == (0, "")
    assert (translation_run / "out.txt").read_text(encoding="utf-8") == piped.out
    back = finetune(
        "translate", "run", "--from", "fr", "--to", "en", "--max-new-tokens", "2", "Bonjour."
    )
    assert back.code == 0
    assert (
        finetune("translate", "run/model", "--from", "en", "--to", "fr", sentences[0]).out
        == piped.out.splitlines()[0] + "\n"
    )


def test_translate_knows_languages_by_any_name_and_the_direction(translation_run):
    plain = finetune("translate", "run", "The house is small.")
    named = finetune(
        "translate", "run", "--from", "eng_Latn", "--to", "French", "The house is small."
    )
    assert (named.code, named.out, named.err) == (0, plain.out, plain.err)
    assert "note:" not in plain.err
    for languages, expected in {
        ("fr", "en"): "note: this run learnt en → fr, not fr → en",
        ("en", "de"): "note: this run learnt en → fr, not en → de",
    }.items():
        result = finetune("translate", "run", "--from", languages[0], "--to", languages[1], "Hm.")
        assert result.code == 0
        assert expected in result.err


def test_inspect_shows_examples_targets_and_figures(chat_run):
    before = snapshot(chat_run)
    result = finetune("inspect", "c.yaml", "--examples", "2")
    assert result.code == 0, result.err
    assert_plain(result.out)
    for text in (
        "example 1: ",
        "example 2: ",
        "⟦It is",
        "<|im_end|>⟧",
        "target share",
        "length p50",
        "tokens per word",
        "duplicates",
        "vocabulary rows used",
    ):
        assert text in result.out, text
    assert "example 3" not in result.out
    assert snapshot(chat_run) == before


def test_inspect_shows_the_characters_a_token_of_each_language(folder, write_config):
    """A tokenizer that is trained on the pairs knows both; one letter a token is bytes."""
    pairs = [{"en": f"Save the file {n}", "ko": f"파일을 저장 {n}"} for n in range(30)]
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"translation": pair}) + "\n" for pair in pairs), encoding="utf-8"
    )
    write_config(
        data={"train": "pairs.jsonl", "max_length": 128},
        model={"config": LLAMA, "tokenizer": {"vocab_size": 260}},
    )
    result = finetune("inspect", "c.yaml", "--examples", "0")
    assert result.code == 0, result.err
    assert re.search(
        r"^characters per token: English \d\.\d\d, Korean 0\.52$", result.out, re.MULTILINE
    )
    assert "Korean falls into bytes: a token has 0.52" in result.err


def test_inspect_colours_the_targets_on_a_terminal(chat_run):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard", width=200)
    inspect_data(load_config(Path("c.yaml")), examples=1, console=console)
    green, dim = (
        re.findall(rf"\x1b\[{code}m([^\x1b]*)", shown.getvalue()) for code in ("1;32", "2")
    )
    assert any(text.startswith("It is ") for text in green)
    assert any("What is " in text for text in dim)
    assert not any("What is " in text for text in green)


def test_plan_prints_figures_and_leaves_nothing(chat_run):
    before = snapshot(chat_run)
    result = finetune("plan", "c.yaml")
    assert result.code == 0, result.err
    assert_plain(result.out)
    for text in ("parameters", "optimizer state", "expected peak", "steps", "training"):
        assert text in result.out, text
    assert snapshot(chat_run) == before


def test_report_writes_the_page_again(chat_run):
    (chat_run / "run" / "report.html").unlink()
    result = finetune("report", "run")
    assert result.out.strip() == "run/report.html"
    assert (chat_run / "run" / "report.html").read_text(encoding="utf-8").startswith("<!")


def test_export_writes_a_plain_model(chat_run):
    assert finetune("export", "run", "out").code == 0
    assert finetune("export", "run", "half", "--dtype", "bfloat16").code == 0
    assert (
        finetune("export", "run", "first", "--checkpoint", "run/checkpoints/step-00000002").code
        == 0
    )
    model, first = (AutoModelForCausalLM.from_pretrained(path) for path in ("out", "first"))
    assert all(
        bool((a == b).all())
        for a, b in zip(model.state_dict().values(), first.state_dict().values(), strict=True)
    )
    assert str(AutoModelForCausalLM.from_pretrained("half", dtype="auto").dtype) == "torch.bfloat16"
    assert AutoTokenizer.from_pretrained("out").chat_template
    again = finetune("export", "run", "out")
    assert (again.code, again.err) == (
        2,
        "finetune: out already exists. Name a folder that does not exist yet\n",
    )
    (chat_run / "run" / "model" / "README.md").write_bytes(b"\xff")
    refused = finetune("export", "run", "other")
    assert refused.code == 2
    assert "run/model/README.md cannot be read: 'utf-8' codec can't decode" in refused.err


@pytest.mark.parametrize("kind", ["random", "pretrained"])
def test_export_a_checkpoint_of_a_stopped_run(chat_run, kind):
    """It equals that of the finished run, tokenizer included.

    The pretrained model has no chat template, so tokens were added to it.
    """
    run, options = "run", ("--checkpoint", "run/checkpoints/step-00000002")
    if kind == "pretrained":
        run, options = "tuned", ("--checkpoint", "tuned/checkpoints/step-00000002")
        base = chat_run / "run" / "model"
        (base / "chat_template.jinja").unlink()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (base / name).write_text((base / name).read_text().replace("<|im_", "<|no_"))
        base.rename(chat_run / "base")
        changes = (
            "model={name: base, chat_template: chatml}",
            "output_dir=tuned",
            "evaluation.before=true",
        )
        assert finetune("train", "c.yaml", *changes).code == 0
    assert finetune("export", run, "finished", *options).code == 0
    shutil.rmtree(chat_run / run / "model")
    (chat_run / run / "evaluation.json").unlink()
    result = finetune("export", run, "stopped", *options)
    assert result.code == 0, result.err
    finished, stopped = snapshot(chat_run / "finished"), snapshot(chat_run / "stopped")
    read, made = (json.loads(files.pop("tokenizer_config.json")) for files in (finished, stopped))
    assert {key for key, value in read.items() if made.get(key) != value} <= {
        "is_local",
        "local_files_only",
    }
    assert stopped == finished
    card = stopped["README.md"].decode()
    assert "| step 2 | " in card
    assert ("| step 0 | " in card) == (kind == "pretrained")
    assert "chat.jsonl (chat)" in card
    assert AutoTokenizer.from_pretrained("stopped").eos_token == "<|im_end|>"
    if kind == "random":
        (chat_run / "chat.jsonl").write_text(
            (chat_run / "chat.jsonl").read_text().replace("plus", "and")
        )
        again = finetune("export", "run", "other", *options)
        assert again.code == 2
        assert again.err.splitlines()[-1].startswith(
            "finetune: the training data of run changed, so its tokenizer cannot be made"
        )


def test_a_checkpoint_goes_with_its_run_and_with_the_base_that_it_was_trained_from(
    base, chat_file, write_config
):
    """Else adapters would be merged into another model, without an error."""
    write_config(model={"config": None, "tokenizer": None, "name": "base", "lora": {"rank": 2}},
                 training={"max_steps": 1})  # fmt: skip
    for run in ("run", "other"):
        assert finetune("train", "c.yaml", f"output_dir={run}").code == 0
    whole = finetune(
        "train", "c.yaml", "output_dir=whole", "model.lora=null", "vocabulary.mode=full"
    )
    assert whole.code == 0, whole.err
    one, other = (f"{run}/checkpoints/step-00000001" for run in ("run", "other"))
    for number, checkpoint in enumerate((one, "run", "auto")):
        result = finetune("export", "run", f"out{number}", "--checkpoint", checkpoint)
        assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained("base")
    for parameter in model.parameters():
        parameter.data.mul_(2)
    model.save_pretrained("base")
    for checkpoint, says in (
        (other, f"{other} is not a checkpoint of run. Give the folder of its run"),
        (one, "began with other weights than base gives now. Restore the model"),
    ):
        result = finetune("export", "run", "out", "--checkpoint", checkpoint)
        assert (result.code, says in result.err) == (2, True), result.err
    kept = finetune("export", "whole", "all", "--checkpoint", "whole/checkpoints/step-00000001")
    assert kept.code == 0, kept.err  # it has every weight
    shutil.rmtree("run/checkpoints")
    result = finetune("export", "run", "out", "--checkpoint", "auto")
    assert (result.code, "has no complete checkpoint to export" in result.err) == (2, True)
    assert not Path("out").exists()


NEO = {
    "model_type": "gpt_neo",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
}


def test_a_model_without_sdpa_is_planned_trained_and_read(folder, write_config):
    """GPT-Neo has only eager attention."""
    neo = {"config": {**NEO, "max_position_embeddings": 128}, "attn_implementation": "eager"}
    write_config(model=neo, data={"packing": False}, training={"max_steps": 1})
    for command in (
        ["inspect", "c.yaml"],
        ["plan", "c.yaml"],
        ["train", "c.yaml"],
        ["evaluate", "run"],
        ["generate", "run", "--prompt", "Hm?"],
        ["generate", "run/model", "--prompt", "Hm?"],
        ["export", "run", "out"],
        ["export", "run", "first", "--checkpoint", "run/checkpoints/step-00000001"],
        [
            "train",
            "c.yaml",
            "model={name: out, attn_implementation: eager}",
            "output_dir=again",
            "--dry-run",
        ],
        ["plan", "c.yaml", "model={name: out, attn_implementation: eager}"],
    ):
        result = finetune(*command)
        assert result.code == 0, (command, result.err)
    result = finetune("train", "c.yaml", "model={name: out}", "output_dir=again", "--dry-run")
    assert result.code == 0, result.err
    assert "attention is eager (model.attn_implementation)" in result.err
    for command in ("inspect", "plan"):
        assert finetune(command, "c.yaml", "model={name: out}", "output_dir=again").code == 0


def test_a_model_with_code_of_its_own_is_trusted_by_the_command_line_alone(chat_run, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(chat_run / "modules")
    )
    own, config = chat_run / "own", chat_run / "own" / "config.json"
    shutil.copytree(chat_run / "run" / "model", own)
    (own / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    named = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    changes = [
        "model={name: own, trust_remote_code: true}",
        "output_dir=other",
        "training.max_steps=1",
    ]
    for command in (
        ["plan", "c.yaml", *changes],
        ["train", "c.yaml", *changes],
        ["train", "c.yaml", *changes, "training.max_steps=2", "--resume", "auto"],
        ["evaluate", "other", "--trust-remote-code"],
        ["generate", "other", "--prompt", "Hm?", "--trust-remote-code"],
        ["export", "other", "out", "--trust-remote-code"],
        ["export", "other", "first", "--checkpoint", "other", "--trust-remote-code"],
        ["inspect", "other/config.yaml", "model.trust_remote_code=true"],
    ):
        result = finetune(*command)
        assert result.code == 0, (command, result.err)
    assert (chat_run / "out" / "code.py").is_file()
    # now it comes from someone else
    (chat_run / "other" / "model" / "code.py").write_text("open('executed', 'w')\n")
    (own / "code.py").write_text("open('executed', 'w')\n")
    for command in (
        ["evaluate", "other"],
        ["generate", "other", "--prompt", "Hm?"],
        ["chat", "other"],
        ["translate", "other", "Hm?", "--from", "en", "--to", "fr"],
        ["export", "other", "new"],
        ["export", "other", "new", "--checkpoint", "other"],
        ["train", "other/config.yaml", "--resume", "auto"],
        ["inspect", "other/config.yaml"],
        ["plan", "other/config.yaml"],
    ):
        result = finetune(*command)
        assert result.code == 2, (command, result.err)
        assert "--trust-remote-code" in result.err
    assert finetune("generate", "own", "--prompt", "Hm?").code == 2
    assert not (chat_run / "executed").exists()


def test_optimizers_lists_them_all():
    result = finetune("optimizers")
    names = list_optimizers()
    assert len(names) >= 10
    assert [name for name in names if f"\n{name}: " not in "\n" + result.out] == []
    assert "betas=(0.9, 0.999)" in result.out
    few = finetune("optimizers", "lazy*").out
    assert "lazy_adamw" in few
    assert "missed_steps=exact" in few
    assert "embeddings=" not in few
    assert "muon" not in few


def test_a_run_is_not_evaluated_on_what_it_was_trained_on(folder, write_config):
    """It held 4 of 48 records out, of the 24 that half of them would be."""
    write_config(data={"validation_fraction": 0.5, "max_validation_records": 4})
    assert finetune("train", "c.yaml").code == 0
    own = json.loads(finetune("evaluate", "run").out)
    for most in ("null", "100"):
        found = json.loads(finetune("evaluate", "run", f"data.max_validation_records={most}").out)
        assert (found["num_records"], found["loss"]) == (4, own["loss"])
    for change in ("seed=1", "data.validation_fraction=0.2"):
        refused = finetune("evaluate", "run", change)
        assert refused.code == 2
        assert f"{change.partition('=')[0]} is not what the run had" in refused.err
        assert "evaluated on records that it was trained on" in refused.err
        assert finetune("evaluate", "run", change, "data.test=chat.jsonl").code == 0
    absolute = json.dumps(str(folder / "chat.jsonl"))
    again = json.loads(finetune("evaluate", "run", f"data.train={absolute}").out)
    assert again["loss"] == own["loss"]
    fewer = finetune("evaluate", "run", "data.train={path: chat.jsonl, max_records: 20}")
    assert (fewer.code, "data.train is not what" in fewer.err) == (2, True)
    config = yaml.safe_load((folder / "c.yaml").read_text())
    config["data"]["validation"] = "held.jsonl"
    (folder / "held.jsonl").write_text((folder / "chat.jsonl").read_text())
    (folder / "c.yaml").write_text(yaml.safe_dump({**config, "output_dir": "second"}))
    assert finetune("train", "c.yaml").code == 0
    learnt = finetune("evaluate", "second", "data.validation=null")
    assert (learnt.code, "data.validation is not what" in learnt.err) == (2, True)


def test_calls_of_tools_are_judged_also_if_the_first_record_has_none(folder, write_config):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    asked = {"role": "user", "content": "Call it."}
    calling = {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    rows = [conversation(0), *[calling] * 20]
    (folder / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tools.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = write_config(
        data={"train": "calls.jsonl"}, evaluation={"generate": 2}, training={"max_steps": 1}
    )
    tree = yaml.safe_load(path.read_text())
    tree["model"]["chat_template"] = "tools.jinja"
    path.write_text(yaml.safe_dump(tree))
    result = finetune("train", "c.yaml")
    assert result.code == 0, result.err
    trained = json.loads((folder / "run" / "evaluation.json").read_text())["after"]
    found = json.loads(finetune("evaluate", "run").out)
    assert found["tool_calls_parsed"] == trained["tool_calls_parsed"]


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_same_question_is_answered_anew_however_many_are_asked_at_a_time(finished, size):
    """Blank lines do not count."""
    lines = ["Hello?", "", "Hello?", "Hello?", "Hello?", "Hello?"]
    opened = open_target(str(finished / "run"))
    settings = {"temperature": 2.0, "max_new_tokens": 8, "batch_size": size}
    display = Display(enabled=False)
    found = [a for _, a in answers_of(opened, lines, seed=3, settings=settings, display=display)]
    assert found.pop(1) == ""
    assert len(set(found)) == 5
    whole = {**settings, "batch_size": 5}
    together = answers_of(opened, ["Hello?"] * 5, seed=3, settings=whole, display=display)
    assert found == [answer for _, answer in together]
