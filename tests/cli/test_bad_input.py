"""A mistake is answered by one message and exit code 2, and nothing that was there is lost."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.cli.conftest import Result, finetune, snapshot
from tests.cli.mistakes import CASES, data
from tests.conftest import LLAMA
from tests.test_messages import problem

KINDS = (
    "config missing or unreadable",
    "unknown key",
    "wrong type",
    "model not found",
    "dataset not found",
    "missing column",
    "empty file",
    "broken JSON",
    "no assistant turn",
    "roles out of order",
    "pair with an empty side",
    "text over the limit",
    "label outside the vocabulary",
    "template that fails",
    "out of disk",
    "another run in the folder",
    "changed model or data",
    "unknown optimizer or option",
    "nothing to evaluate on",
    "no run and no model",
    "zero target tokens",
    "settings that contradict each other",
    "usage",
)
BY_NAME = {name: case for cases in CASES.values() for name, case in cases.items()}


@pytest.fixture
def copy(finished, folder) -> Path:
    """Return the working directory, with a copy of what `finished` has."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


def assert_message(result: Result, *says: str) -> None:
    """Check that a command failed with one message, that it has the form, and all of `says`."""
    *progress, last = result.err.splitlines() or [""]
    assert last.startswith("finetune: "), result.err
    message = last.removeprefix("finetune: ")
    assert result.code == 2
    assert result.out == ""
    assert not [
        line for line in progress if line.startswith(("finetune: ", "Traceback", "  File"))
    ], result.err
    assert problem(message) is None, f"{problem(message)}: {message}"
    assert len(message) < 500, message
    missing = [text for text in says if text not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("name", BY_NAME)
def test_a_mistake_is_one_message_and_leaves_everything_as_it_was(
    name, folder, write_config, finished
):
    case = BY_NAME[name]
    write_config(**case.config)
    for path, content in case.files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    if "model" in case.command:
        shutil.copytree(finished / "run" / "model", folder / "model")
    before = snapshot(folder)
    result = finetune(*case.command)
    assert_message(result, *case.says)
    assert snapshot(folder) == before


OTHER_TESTS = {
    "label outside the vocabulary",
    "out of disk",
    "another run in the folder",
    "changed model or data",
}


def test_every_kind_of_mistake_is_tried():
    assert CASES.keys() | OTHER_TESTS == set(KINDS)
    assert min(map(len, CASES.values())) >= 1
    assert len(BY_NAME) == sum(map(len, CASES.values())) >= 100


def test_another_run_in_the_folder_is_not_touched(copy):
    before = snapshot(copy)
    result = finetune("train", "c.yaml")
    assert_message(
        result,
        "run holds a run already",
        "--resume auto",
        "output_dir",
        "overwrite_output_dir=true",
    )
    assert snapshot(copy) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.config.num_hidden_layers=1", "the model changed"),
        ("data.targets=all", "the training data changed"),
        ("training.batch_size=8", "training.batch_size changed (then 4, now 8)"),
        ("optimizer.name=sgd", "optimizer.name changed (then adamw, now sgd)"),
    ],
)
def test_a_run_with_another_model_or_other_data_is_not_resumed(copy, change, says):
    before = snapshot(copy)
    result = finetune("train", "c.yaml", change, "--resume", "auto")
    assert_message(result, "step-00000002 cannot be resumed", says, "another output_dir")
    assert snapshot(copy) == before


@pytest.mark.parametrize(
    "command",
    ["generate run --prompt a", "evaluate run", "export run out --checkpoint CHECKPOINT"],
)
def test_a_run_whose_config_has_a_former_key_says_where_it_is(copy, command):
    config = copy / "run" / "config.yaml"
    text = config.read_text()
    assert "max_validation_records" in text
    config.write_text(text.replace("max_validation_records", "max_validation_rows"))
    before = snapshot(copy)
    command = command.replace("CHECKPOINT", "run/checkpoints/step-00000002")
    assert_message(
        finetune(*command.split()),
        "run/config.yaml: data: 'max_validation_rows' is not a key here. "
        "Write data.max_validation_records",
    )
    assert snapshot(copy) == before


def test_a_stream_without_targets_ends_before_the_first_step(folder, write_config):
    """The first records of a stream are read before the run starts."""
    write_config(data={"max_length": 4, "validation_fraction": 0.0, "streaming": True})
    result = finetune("train", "c.yaml")
    assert_message(
        result, "no target tokens in 48 records", "48 without a target", "Raise data.max_length"
    )
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.format=text"], ["format 'text'", "messages"]),
        (
            ["training.max_time=10min", "scheduler.warmup_steps=100"],
            ["scheduler.warmup_steps counts steps", "Set scheduler.warmup_ratio instead"],
        ),
        (
            ["evaluation.metrics=[chrf]", "evaluation.generate=4", "generation.max_new_tokens=120"],
            ["no held-out record gives a prompt to compute chrf from"],
        ),
    ],
)
def test_a_mistake_with_overwrite_deletes_nothing_and_a_dry_run_finds_it(copy, changes, says):
    before = snapshot(copy)
    for option in ("overwrite_output_dir=true", "--dry-run"):
        assert_message(finetune("train", "c.yaml", *changes, option), *says)
        assert snapshot(copy) == before


def in_a_process(*arguments: str, file_size: int | None = None, **environment: str) -> Result:
    """Run `python -m finetune ARGUMENTS`, with files of at most `file_size` bytes."""

    def limit() -> None:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    done = subprocess.run(
        [sys.executable, "-m", "finetune", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_label_outside_the_vocabulary(copy, command):
    """A tokenizer has 300 entries, and the model's table 280 rows."""
    folder = copy / "run" / "model"
    settings = {name: value for name, value in LLAMA.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**settings, vocab_size=280)).save_pretrained(folder)
    before = snapshot(copy)
    change = ("model={name: run/model}", "output_dir=other")
    result = finetune(
        *(
            ("train", "c.yaml", *change)
            if command == "train"
            else ("evaluate", "run/model", *change, "--config", "c.yaml")
        )
    )
    assert_message(
        result,
        "chat.jsonl line ",
        "is outside the model's vocabulary of 280 rows",
        "the tokenizer does not belong",
    )
    assert snapshot(copy) == before


@pytest.mark.slow
def test_out_of_disk_leaves_the_previous_checkpoint_and_a_run_that_resumes(copy):
    checkpoint = snapshot(copy / "run" / "checkpoints")
    full = in_a_process(
        "train", "c.yaml", "training.max_steps=4", "--resume", "auto", file_size=60_000
    )
    assert_message(
        full,
        "the checkpoint of step 3 could not be written",
        "File too large",
        "step-00000002 is untouched",
    )
    assert snapshot(copy / "run" / "checkpoints") == checkpoint
    again = finetune("train", "c.yaml", "training.max_steps=4", "--resume", "auto")
    assert again.code == 0, again.err
    assert "resuming after step 2" in again.err
    steps = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "environment.json", "data.json", "evaluation.json"]
)
def test_out_of_disk_in_any_file_of_a_run(copy, name):
    """The file is a link to a device that is always full."""
    written = copy / "run" / (name if name.endswith(".jsonl") else f".{name}.tmp")
    written.unlink(missing_ok=True)
    written.symlink_to("/dev/full")
    kept = (copy / "run" / name).read_text() if name.endswith(".json") else None
    checkpoint = snapshot(copy / "run" / "checkpoints" / "step-00000002")
    result = finetune(
        "train",
        "c.yaml",
        "training.max_steps=3",
        "checkpoint.every=3",
        "evaluation.every=3",
        "--resume",
        "auto",
    )
    step = "step-00000003" if name == "evaluation.json" else "step-00000002"
    assert_message(
        result, f"run/{name} could not be written: No space left on device", f"{step} is untouched"
    )
    assert snapshot(copy / "run" / "checkpoints" / "step-00000002") == checkpoint
    if kept is not None:
        assert (copy / "run" / name).read_text() == kept


def test_out_of_disk_outside_of_a_run(folder):
    (folder / "out").mkdir()
    (folder / "out" / ".beale.svg.tmp").symlink_to("/dev/full")
    result = finetune(
        "landscape",
        "--functions",
        "beale",
        "--optimizers",
        "sgd",
        "--steps",
        "3",
        "--output",
        "out",
    )
    assert result.code == 2
    assert "out/beale.svg could not be written: No space left on device" in result.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_does_not_answer_is_given_up_in_seconds(kind, folder, write_config):
    """The server accepts connections and never answers, the worst way to be unreachable."""
    write_config(
        **(
            {"model": {"config": None, "tokenizer": None, "name": "some/name"}}
            if kind == "model"
            else data("some/name")
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
        started = time.monotonic()
        result = in_a_process(
            "train", "c.yaml", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint, NO_PROXY="127.0.0.1"
        )
        seconds = time.monotonic() - started
    assert_message(
        result, "'some/name'", "not found", str(folder), "reach" if kind == "dataset" else "reached"
    )
    assert seconds < 60
