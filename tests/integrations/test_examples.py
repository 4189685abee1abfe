"""Every script of examples/ as a process: the named optimizer trains; lazy_adamw equals AdamW."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"ultralytics_yolo.py"}  # tests/integrations/test_ultralytics.py
EXAMPLES = sorted(
    path.name for path in (ROOT / "examples").glob("*.py") if path.name not in ELSEWHERE
)
CLASSES = {"lazy_adamw": "LazyAdamW", "adamw": "AdamW", "AdaGrad": "Adagrad"}


def run(example: str, folder: Path) -> dict[str, dict]:
    """What the script printed for each optimizer."""
    command = [sys.executable, ROOT / "examples" / example, *CLASSES]
    done = subprocess.run(
        command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{example}\n{done.stdout}\n{done.stderr}"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"asked"')]
    return {line["asked"]: line for line in lines}


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
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, *ELSEWHERE}


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
    for outcome in outcomes[
        "sampled_vocabulary.py"
    ].values():  # after the last step, of the plain model
        assert outcome["losses"][-1] - 0.3 < outcome["whole"] < outcome["losses"][-1]


@pytest.mark.parametrize("example", [*EXAMPLES, *sorted(ELSEWHERE)])
def test_an_example_is_short(example):
    assert len((ROOT / "examples" / example).read_text(encoding="utf-8").splitlines()) <= 60
