"""Shared beginnings in two processes: the run is that of one process that shares nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.config.loading import load_config
from finetune.display import Display
from finetune.recipes.train.train import run_training
from tests.conftest import LLAMA, conversation
from tests.distributed import engine_worker
from tests.distributed.processes import free_ports, run_forked

RULES = "You add numbers, and answer in one short sentence without a word that is not needed."


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make shared.yaml, and alone/, its run in one process without sharing."""
    folder = tmp_path_factory.mktemp("sharing")
    with (folder / "chat.jsonl").open("w", encoding="utf-8") as file:
        for number in range(48):
            record = conversation(number)
            record["messages"].insert(0, {"role": "system", "content": RULES})
            file.write(json.dumps(record) + "\n")
    sizes = {"max_steps": 6, "batch_size": 7, "micro_batch_size": 1}
    tree = {
        "model": {"config": LLAMA, "tokenizer": {"vocab_size": 300}},
        "data": {"train": "chat.jsonl", "validation_fraction": 0.2, "max_length": 128},
        "optimizer": {"lr": 3e-3, "name": "adamw"},
        "vocabulary": {"mode": "active"},
        "training": {**sizes, "timeout": 60, "precision": "fp32"},
        "evaluation": {"every": 3, "samples": 0, "generate": 0},
    }
    (folder / "shared.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        overrides = ["output_dir=alone", "training.share_prefixes=false"]
        run_training(load_config(Path("shared.yaml"), overrides), display=Display(enabled=False))
    return folder


def assert_same_run(run: Path) -> None:
    """Compare the losses with those of alone/, and see that fewer tokens were computed."""
    found, wanted = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run, run.parent / "alone")
    )
    losses = [
        [line.get("loss", line.get("evaluation", {}).get("loss")) for line in lines]
        for lines in (found, wanted)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    steps, plain = ([line for line in lines if "loss" in line] for lines in (found, wanted))
    assert len(steps) == 6
    for step, other in zip(steps, plain, strict=True):
        assert step["num_tokens"] == other["num_tokens"] == other["num_computed_tokens"]
        assert step["num_target_tokens"] == other["num_target_tokens"]
    tokens, computed = (sum(s[key] for s in steps) for key in ("num_tokens", "num_computed_tokens"))
    assert computed < 0.75 * tokens


@pytest.mark.slow
def test_two_processes_share_what_one_computes_apart(folder):
    command = ["-m", "finetune", "train", "shared.yaml", "output_dir=two", "--processes", "2"]
    ended = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_same_run(folder / "two")


@pytest.mark.slow
def test_fsdp2_shares_what_one_process_computes_apart(folder):
    (port,) = free_ports(1)
    ended = run_forked(engine_worker, [("share", folder, rank, 2, port) for rank in range(2)])
    assert ended == [0, 0], (folder / "share0.log").read_text()
    assert_same_run(folder / "fsdp2")
