"""Every script of examples/ as a process: the named optimizer trains; lazy_adamw equals AdamW.

`training_loop.py` takes a config instead, and its losses are those of `finetune train`.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.recipes.train.train import run_training
from finetune.run.folder import RunDir
from finetune.run.records import StepRecord, read_metrics
from tests.conftest import LLAMA, PYTHIA

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.name for path in (ROOT / "examples").glob("*.py")}
LOOP = "training_loop.py"
ELSEWHERE = {"ultralytics_yolo.py"}  # tests/integrations/test_ultralytics.py
EXAMPLES = sorted(SCRIPTS - ELSEWHERE - {LOOP})
CLASSES = {"lazy_adamw": "LazyAdamW", "adamw": "AdamW", "AdaGrad": "Adagrad"}


def run(example: str, folder: Path) -> dict[str, dict]:
    """Return what the script printed for each optimizer."""
    lines = printed(example, *CLASSES, cwd=folder)
    return {line["asked"]: line for line in lines if "asked" in line}


def printed(example: str, *arguments: str, cwd: Path) -> list[dict]:
    """Return the JSON lines that the script printed."""
    command = [sys.executable, ROOT / "examples" / example, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{example}\n{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("examples")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(EXAMPLES, pool.map(lambda example: run(example, folder), EXAMPLES)))


def test_there_is_an_example_for_each_trainer():
    trainers = [
        "accelerate_loop.py",
        "hugging_face_trainer.py",
        "lightning_module.py",
        "plain_torch.py",
        "trl_sft.py",
    ]
    assert set(EXAMPLES) == {*trainers, "sampled_vocabulary.py"}
    assert {*EXAMPLES, *ELSEWHERE, LOOP} == SCRIPTS


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_optimizer_asked_for_trains(outcomes, example):
    for name, optimizer in CLASSES.items():
        outcome = outcomes[example][name]
        assert outcome["trained_by"].removeprefix("Lightning") == optimizer
        losses = outcome["losses"]
        assert len(losses) >= 10
        assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_lazy_adamw_takes_the_path_of_adamw(outcomes, example):
    lazy, dense, other = (outcomes[example][name]["losses"] for name in CLASSES)
    assert lazy == pytest.approx(dense, abs=1e-5)
    assert other != pytest.approx(dense, abs=1e-3)


@pytest.mark.slow
def test_the_sampled_loss_stands_for_the_whole_one(outcomes):
    for outcome in outcomes["sampled_vocabulary.py"].values():
        # after the last step, of the plain model
        assert outcome["losses"][-1] - 0.3 < outcome["whole"] < outcome["losses"][-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (LLAMA, {"vocabulary": {"mode": "sampled", "num_sampled": 16}}),
        (PYTHIA, {"optimizer": {"name": "lazy_adamw", "lr": 3e-3}}),  # has dropout
    ],
    ids=["sampled", "lazy_adamw"],
)
def test_the_loop_takes_the_steps_of_train(tiny, tmp_path, model, changes):
    model = {"config": model, "tokenizer": {"vocab_size": 400}}
    config = tiny(model=model, training={"max_steps": 12}, **changes)
    run_training(make_config(config), display=Display(enabled=False))
    records, _ = read_metrics(RunDir(tmp_path / "run"))
    taken = [record for record in records if isinstance(record, StepRecord)]
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(config))
    *steps, end = printed(LOOP, "loop.yaml", "output_dir=loop", cwd=tmp_path)
    losses = [step["loss"] for step in steps]
    assert losses == [step.loss for step in taken]
    assert [step["lr"] for step in steps] == [step.lr for step in taken]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert end["metrics"]["loss"] == records[-1].metrics["loss"]
    assert end["answers"]
    weights = "model/model.safetensors"
    assert (tmp_path / "loop" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


@pytest.mark.parametrize("example", sorted(SCRIPTS))
def test_an_example_is_short(example):
    assert len((ROOT / "examples" / example).read_text(encoding="utf-8").splitlines()) <= 60
