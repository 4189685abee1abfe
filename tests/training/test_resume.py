"""A killed run goes on as if nothing had happened: losses and weights of an uninterrupted run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import LLAMA, PYTHIA, conversation

KILL_AFTER_LOGGING = """
import os, signal
from finetune.run.log import MetricLogger
log = MetricLogger.log
def log_then_die(self, record):
    log(self, record)
    if record.step == 5 and hasattr(record, "loss"):
        os.kill(os.getpid(), signal.SIGKILL)
MetricLogger.log = log_then_die
"""

KILL_IN_MID_SAVE = """
import os, signal
from finetune.training import checkpoint
write = checkpoint._write_file
def write_half_then_die(path, content):
    written = write(path, content)
    if path.parent.name.endswith("6") and path.name == "optimizer.pt":
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return written
checkpoint._write_file = write_half_then_die
"""


def finetune(*arguments: str, before: str = "", cwd: Path) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, after the code `before`."""
    code = (
        f"{before}\nimport sys; sys.argv = ['finetune', *{list(arguments)!r}]\n"
        "from finetune.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=240
    )


def losses(run: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (record["step"], record["loss"], record["grad_norm"])
        for record in records
        if "loss" in record
    ]


@pytest.fixture
def config(tmp_path, request):
    """Ten steps over two and a half epochs, a checkpoint every three, dropout on."""
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(48))
    )
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(100, 106))
    )
    tree = {
        "model": {"config": {**LLAMA, "attention_dropout": 0.1}, "tokenizer": {"vocab_size": 300}},
        "data": {"train": "chat.jsonl", "validation": "held.jsonl", "max_length": 64},
        "optimizer": {"lr": 3e-3},
        "training": {"max_steps": 10, "batch_size": 4, "micro_batch_size": 2},
        "checkpoint": {"every": 3, "keep": 2},
        "evaluation": {"every": 4, "samples": 1, "before": False},
        "generation": {"max_new_tokens": 4, "temperature": 1.0},
    }
    for section, values in request.param.items():
        tree[section] = {**tree[section], **values}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


LAZY = {"model": {"config": PYTHIA}, "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "no_decay": []}}
STREAMING = {
    "data": {
        "train": "chat.jsonl",
        "validation": "held.jsonl",
        "max_length": 64,
        "streaming": True,
        "shuffle_buffer": 16,
    }
}
LORA = {"model": {"lora": {"rank": 4}}, "data": {"packing": False}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kill"),
    [
        (LAZY, KILL_AFTER_LOGGING),
        (LAZY, KILL_IN_MID_SAVE),
        (STREAMING, KILL_AFTER_LOGGING),
        (LORA, KILL_AFTER_LOGGING),
    ],
    ids=["lazy, mid-epoch", "lazy, mid-save", "streaming", "lora, padded"],
    indirect=["config"],
)
def test_a_killed_run_resumes_bit_for_bit(config, kill):
    whole = finetune("train", "c.yaml", "output_dir=whole", cwd=config)
    assert whole.returncode == 0, whole.stderr
    killed = finetune("train", "c.yaml", "output_dir=killed", before=kill, cwd=config)
    assert killed.returncode == -9, killed.stderr
    assert not (config / "killed" / "model").exists()
    resumed = finetune("train", "c.yaml", "output_dir=killed", "--resume", "auto", cwd=config)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 4" in resumed.stderr  # the best evaluation so far is saved besides
    assert losses(config / "killed") == losses(config / "whole")
    assert len(losses(config / "whole")) == 10
    whole_weights, resumed_weights = (
        load_file(config / run / "model" / "model.safetensors") for run in ("whole", "killed")
    )
    assert whole_weights.keys() == resumed_weights.keys()
    assert all((whole_weights[name] == resumed_weights[name]).all() for name in whole_weights)
    assert (config / "killed" / "samples.jsonl").read_text() == (
        config / "whole" / "samples.jsonl"
    ).read_text()
    assert not list((config / "killed" / "checkpoints").glob(".step-*"))
