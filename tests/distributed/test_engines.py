"""FSDP2 over gloo on the CPU, and what is refused: the engines in which a parameter is not whole on a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from finetune.config.loading import load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.training import run_training
from tests.conftest import LLAMA, PYTHIA, conversation

FSDP2 = {  # what `accelerate launch --config_file configs/accelerate/fsdp2.yaml` sets
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
WORKER = """
import os, sys, torch
from pathlib import Path
from accelerate import PartialState
from accelerate.state import AcceleratorState
from finetune.config.loading import load_config
from finetune.display import Display
from finetune.recipes import engines, training

PartialState.destroy_process_group = lambda self, group=None: None  # the next run uses it
shards = {}
prepare = engines.prepare
def prepare_and_look(accelerator, language_model, optimizer, display):
    module, optimizer = prepare(accelerator, language_model, optimizer, display)
    for name, parameter in module.named_parameters():
        shards[name] = parameter.to_local().numel() / parameter.numel() if hasattr(parameter, "to_local") else 1.0
    return module, optimizer
training.prepare = prepare_and_look

def run(config, *overrides, resume=None):
    shards.clear()
    config = load_config(Path(config), overrides)
    assert training.run_training(config, resume=resume, display=Display(enabled=False)) == "finished"
    if os.environ["RANK"] == "0":
        torch.save(dict(shards), f"{config.output_dir}/shards.pt")
    AcceleratorState._reset_state(reset_partial_state=True)

run("lazy.yaml", "output_dir=lazy")
run("lazy.yaml", "output_dir=half", resume="auto")
run("tied.yaml", "output_dir=tied")
"""


def write(folder: Path, name: str, **sections) -> None:
    tree = {
        "data": {"train": "chat.jsonl", "validation": "held.jsonl", "max_length": 64},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "no_decay": []},
        "training": {"max_steps": 8, "batch_size": 4, "micro_batch_size": 1, "timeout": 60},
        "checkpoint": {"every": 3, "keep": 4},
        "evaluation": {"every": 4, "samples": 1},  # one prompt: process 0 has none to answer
        "generation": {"max_new_tokens": 4},
        **sections,
    }
    (folder / name).write_text(yaml.safe_dump(tree))


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record.get("loss", record.get("evaluation", {}).get("loss")) for record in records(run)]


def alone(*overrides: str, config: str = "lazy.yaml", resume: str | None = None) -> None:
    assert run_training(load_config(Path(config), overrides), resume=resume, display=Display(enabled=False)) == "finished"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs on two processes under FSDP2, and the same on one: lazy/ and lazy1/, tied/ and tied1/; half/ is begun by one.

    tied.yaml has an active vocabulary: the head's table is one of few rows, beside a frozen one.
    """
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "chat.jsonl").write_text("".join(json.dumps(conversation(n)) + "\n" for n in range(48)))
    (folder / "held.jsonl").write_text("".join(json.dumps(conversation(n)) + "\n" for n in range(100, 106)))
    write(folder, "lazy.yaml", model={"config": {**PYTHIA, "hidden_dropout": 0.0}, "tokenizer": {"vocab_size": 300}})
    active = {"optimizer": {"lr": 3e-3, "name": "adamw"}, "vocabulary": {"mode": "active"}}
    write(folder, "tied.yaml", model={"config": LLAMA, "tokenizer": {"vocab_size": 300}}, **active)
    (folder / "worker.py").write_text(WORKER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        alone("output_dir=lazy1")
        alone("output_dir=tied1", config="tied.yaml")
        alone("output_dir=half", "training.max_steps=4", "scheduler.name=constant")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py"],
        cwd=folder,
        env={**os.environ, **FSDP2, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lazy", "tied"])
def test_fsdp2_trains_as_one_process_does(folder, name):
    ours, theirs = losses(folder / name), losses(folder / f"{name}1")
    assert len(ours) == 8 + 3  # steps and evaluations
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert (folder / name / "samples.jsonl").read_text() == (folder / f"{name}1" / "samples.jsonl").read_text()


@pytest.mark.slow
def test_all_is_sharded_but_the_lazy_table(folder):
    lazy, tied = (torch.load(folder / name / "shards.pt") for name in ("lazy", "tied"))
    whole = [name for name, share in lazy.items() if share == 1.0]
    assert whole == ["model.gpt_neox.embed_in.weight"]
    assert all(share < 1 for share in tied.values())
    assert len(tied) > 10
    notes = json.loads((folder / "lazy" / "environment.json").read_text())["notes"]
    assert any(note.startswith("engine: FSDP2 shards the model over 2 processes; the lazily trained embedding") for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lazy", "tied"])
def test_the_checkpoint_is_that_of_one_process_and_the_model_loads(folder, name):
    for file in ("model.pt", "optimizer.pt", "training.pt"):
        ours, theirs = (torch.load(folder / run / "checkpoints" / "step-00000006" / file) for run in (name, f"{name}1"))
        same_shape(ours, theirs, file)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder / run / "model") for run in (name, f"{name}1"))
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_run_goes_from_one_process_to_fsdp2_and_back(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [record["step"] for record in records(folder / "half") if "loss" in record] == list(range(1, 9))
    alone("output_dir=lazy", "training.max_steps=10", resume="lazy/checkpoints/step-00000006")
    alone("output_dir=lazy1", "training.max_steps=10", resume="lazy1/checkpoints/step-00000006")
    assert len(losses(folder / "lazy")) == len(losses(folder / "lazy1")) == 10 + 4
    assert losses(folder / "lazy") == pytest.approx(losses(folder / "lazy1"), abs=1e-5)


def same_shape(ours, theirs, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            same_shape(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, torch.Tensor):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), where


def test_deepspeed_is_refused_before_it_starts(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as `accelerate launch` sets it
    with pytest.raises(UserError, match=r"DeepSpeed is not an engine here.*configs/accelerate/fsdp2.yaml"):
        alone("output_dir=never")
    assert not Path("never").exists()
