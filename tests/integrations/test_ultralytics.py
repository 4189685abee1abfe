"""Ultralytics YOLO26 with the factory's optimizers, in a process of its own.

It is AGPL-3.0 and not part of the test environment.
`make test-ultralytics` puts it into a folder beside the environment and runs this file.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.integrations.ultralytics import with_factory

EXAMPLE = Path(__file__).parents[2] / "examples" / "ultralytics_yolo.py"

COMPARE = """
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("example", sys.argv[1])
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
theirs, ours = example.DetectionTrainer, example.with_factory(example.DetectionTrainer)
runs = (
    ("theirs", "AdamW", theirs),
    ("ours", "adamw", ours),
    ("sgd", "SGD", ours),
    ("muon", "MuSGD", ours),
)
options = dict(momentum=0.9, epochs=2, warmup_bias_lr=0.02)
for label, name, trainer in runs:
    folder = Path(sys.argv[2]) / label
    folder.mkdir()
    optimizer, losses = example.train(name, folder, trainer, **options)
    momenta = sorted({float(group.get("momentum", -1)) for group in optimizer.param_groups})
    tags = sorted(group["param_group"] for group in optimizer.param_groups)
    found = {"asked": label, "class": type(optimizer).__name__, "losses": losses}
    print(json.dumps(found | {"momenta": momenta, "tags": tags}))
"""

# Ultralytics imports torchvision, whose wheel fails with a torch built for the CPU alone.
# Of torchvision only nms is called.
STAND_IN = """
from types import SimpleNamespace

def nms(boxes, scores, threshold):
    from ultralytics.utils.nms import TorchNMS
    return TorchNMS.nms(boxes, scores, threshold)

ops = SimpleNamespace(nms=nms)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    for library in ("ultralytics", "torchvision"):
        try:
            importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(
                f"{library} is not installed; `make test-ultralytics` brings it for this test alone"
            )
    folder = tmp_path_factory.mktemp("ultralytics")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").write_text(STAND_IN)
        paths = [str(folder), *paths]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "YOLO_CONFIG_DIR": str(folder),
        "YOLO_OFFLINE": "true",
    }

    def run(*command: str | Path) -> dict[str, dict]:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        lines = [
            json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"asked"')
        ]
        return {line["asked"]: line for line in lines}

    return run


@pytest.mark.slow
def test_yolo_trains_with_an_optimizer_that_it_does_not_have(run):
    outcome = run(EXAMPLE, "AdaGrad")["AdaGrad"]
    assert outcome["trained_by"] == "Adagrad"
    assert len(outcome["losses"]) == 6
    assert outcome["losses"][-1] < outcome["losses"][0]


@pytest.mark.slow
def test_adamw_is_theirs_and_a_name_means_its_rule(run, tmp_path):
    outcomes = run("-c", COMPARE, EXAMPLE, tmp_path)
    assert outcomes["ours"]["class"] == outcomes["theirs"]["class"] == "AdamW"
    assert outcomes["ours"]["tags"] == outcomes["theirs"]["tags"] == ["bias", "bn", "weight"]
    assert outcomes["ours"]["losses"] == pytest.approx(outcomes["theirs"]["losses"], rel=1e-4)
    assert outcomes["sgd"]["losses"] != pytest.approx(outcomes["theirs"]["losses"], rel=1e-3)
    assert (outcomes["sgd"]["class"], outcomes["sgd"]["momenta"]) == ("SGD", [0.0])
    assert outcomes["muon"]["class"] == "MuSGD"


class Trainer:
    """What with_factory needs of a trainer: the one method it overrides."""

    def build_optimizer(
        self, model, name="auto", lr=0.001, momentum=0.9, decay=1e-5, iterations=1e5
    ):
        return f"their {name}"


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))


def test_groups_lr_and_decay_are_the_trainers(model):
    optimizer = with_factory(Trainer, betas=(0.8, 0.9))().build_optimizer(
        model, "AdamW", lr=0.02, momentum=0.937, decay=0.3
    )
    assert type(optimizer) is torch.optim.AdamW
    groups = {group["param_group"]: group for group in optimizer.param_groups}
    assert {tag: len(group["params"]) for tag, group in groups.items()} == {
        "weight": 2,
        "bn": 1,
        "bias": 2,
    }
    assert {tag: (group["lr"], group["weight_decay"]) for tag, group in groups.items()} == {
        "weight": (0.02, 0.3),
        "bn": (0.02, 0.0),
        "bias": (0.02, 0.0),
    }
    assert groups["weight"]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("name", "momentum"), [("SGD", 0.0), ("rmsprop", 0.0), ("momentum", 0.937), ("Nesterov", 0.937)]
)
def test_the_warm_up_s_momentum_reaches_only_those_that_have_one(model, name, momentum):
    optimizer = with_factory(Trainer)().build_optimizer(model, name, momentum=0.937)
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    for group in optimizer.param_groups:
        assert group["momentum"] == momentum
        group["momentum"] = 0.5  # what the trainer's warm-up does
    optimizer.step()
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5 if momentum else 0.0}


def test_names_that_only_they_have_stay_theirs(model):
    trainer = with_factory(Trainer)()
    assert trainer.build_optimizer(model) == "their auto"
    assert trainer.build_optimizer(model, "MuSGD") == "their MuSGD"
    assert type(trainer).__name__ == "FactoryTrainer"
    with pytest.raises(UserError, match="Did you mean 'adagrad'"):
        trainer.build_optimizer(model, "adagard")


def test_what_the_trainer_already_says_is_not_said_twice():
    with pytest.raises(UserError, match=r"train\(\.\.\.\) has lr0="):
        with_factory(Trainer, lr=0.1)
    with pytest.raises(UserError, match="takes an Ultralytics trainer class"):
        with_factory(nn.Module)
