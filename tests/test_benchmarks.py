"""The benchmarks run on a tiny model. Its figures mean nothing, except what holds on any model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.recipes.train.train import run_training

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHAPE = ("--sequences=2", "--length=64", "--held-out=4")


def bench(name: str, *arguments: str) -> dict:
    """Return the JSON line at the end of what a benchmark prints."""
    command = [sys.executable, str(SCRIPTS / name), *arguments, "--threads=1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture
def model(tiny, tmp_path) -> str:
    """The argument that names a tiny model."""
    run_training(make_config(tiny(training={"max_steps": 1})), display=Display(enabled=False))
    return f"--model={tmp_path / 'run' / 'model'}"


@pytest.mark.slow
def test_modes_of_the_vocabulary(model):
    names = "--contestants=finetune:active,bare"
    found = bench("bench_vocabulary.py", model, *SHAPE, "--steps=3", names)["lrs"]["0.0001"]
    ours, bare = (found["contestants"][name] for name in ("finetune:active", "bare"))
    assert ours["inactive_rows_moved"][0] == 0.0
    assert 0 < ours["inactive_mass"][0] < ours["inactive_mass_p99"][0] <= 1
    assert 0 <= ours["generated_outside"][0] <= 1
    assert 0 < ours["training_state_gb"][0] <= bare["training_state_gb"][0]
    for contestant in (ours, bare):
        assert contestant["tokens_per_second"][0] > 0
        assert contestant["share_of_matmul_peak"][0] > 0
    ratio = found["ratios"]["finetune:active over bare"]["held_out_loss"][0]
    assert ratio == pytest.approx(ours["held_out_loss"][0] / bare["held_out_loss"][0], abs=1e-3)


@pytest.mark.slow
def test_a_training_step(model):
    found = bench("bench_train.py", model, "--quick", "--shapes=2x64", "--contestants=finetune")
    (shape,) = found["shapes"]
    assert (shape["sequences"], shape["length"]) == (2, 64)
    assert shape["contestants"]["finetune"]["tokens_trained"] > 200


@pytest.mark.slow
def test_the_parts_of_a_step_are_the_step(model):
    found = bench("profile_step.py", model, *SHAPE, "--steps=4")
    parts = dict(found["parts"])
    total, others = parts.pop("step"), ("tokens", "targets", "system time", "page faults")
    seconds = [value for name, value in parts.items() if name not in others]
    assert len(seconds) == 7  # data, forward, backward, clip, optimizer, zero_grad, everything else
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(total, rel=0.5)  # medians of each
    assert found["operators"][0]["seconds"] > 0


@pytest.mark.slow
def test_a_sample_of_all_frozen_rows_is_exact(model):
    options = ("--steps=2", "--sizes=4,9999", "--batches=2")
    found = bench("sampling_error.py", model, *SHAPE, *options)
    for way in ("before", "now", "even"):
        some, whole = (found["ways"][f"{way} {size}"] for size in (4, 9999))
        for kind in ("shift", "table", "rest"):
            assert whole[f"{kind} error"][2] < 1e-3 < some[f"{kind} error"][0], (way, kind)
    assert all(value > 0.1 for value in found["batch"].values())


@pytest.mark.slow
def test_losses_of_a_head():
    sizes = ("--tokens=40", "--active=100", "--sampled=50", "--rounds=2")
    found = bench("bench_loss.py", "--heads", "300x32", "500x32", *sizes)
    assert [head["rows"] for head in found["heads"]] == [300, 500]
    for head in found["heads"]:
        losses = {name: way["loss"] for name, way in head["ways"].items()}
        sampled = losses.pop("sampled")
        assert {"full", "active", "plain"} <= set(losses)
        assert list(losses.values()) == pytest.approx([losses["plain"]] * len(losses), rel=1e-3)
        assert sampled == pytest.approx(losses["plain"], rel=0.02)


@pytest.mark.slow
def test_an_export(tiny, tmp_path):
    pytest.importorskip("xllamacpp")
    pairs = {"path": "package:translation.en-fr.train", "max_records": 40}
    data = {"train": pairs, "test": pairs | {"max_records": 6}, "max_length": 128}
    run_training(make_config(tiny(data=data)), display=Display(enabled=False))
    options = ("--sentences=4", "--tokens=6", "--frequent=0")
    found = bench("bench_export.py", str(tmp_path / "run"), *options)
    assert found["trimmed"]["parameters"] <= found["whole"]["parameters"]
    assert found["trimmed"]["gguf_mb"] > 0
    assert found["answers"]["same_within"] == 1
    assert found["batches"]["same"] == 1
    assert all(rate > 0 for rates in found["speed"].values() for rate in rates)
