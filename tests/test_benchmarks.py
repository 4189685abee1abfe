"""The benchmarks run on a tiny model. Its figures mean nothing, except what holds on any model."""

import json
import os
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.recipes.train.train import run_training
from tests.conftest import LLAMA

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHAPE = ("--sequences=2", "--length=64", "--held-out=4")


def bench(name: str, *arguments: str, threads: bool = True) -> dict:
    """Return the JSON line at the end of what a benchmark prints."""
    command = [sys.executable, str(SCRIPTS / name), *arguments, *["--threads=1"] * threads]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture
def long_model(tiny, tmp_path) -> str:
    """The argument that names a tiny model that reads 2,048 tokens."""
    config = LLAMA | {"max_position_embeddings": 2048}
    run = tiny(model={"config": config}, training={"max_steps": 1})
    run_training(make_config(run), display=Display(enabled=False))
    return f"--model={tmp_path / 'run' / 'model'}"


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
def test_steps_of_optimizers():
    [found] = bench(
        "bench_optimizer.py", "--table", "500", "32", "20", "--repeats=3", threads=False
    )["steps"]
    assert found["lookup"]["median_ms"] > 0
    state = {name: one["state_bytes"] for name, one in found["optimizers"].items()}
    assert state["AdamW(fused)"] == 2 * 4 * 500 * 32 + 4
    assert state["LazyAdamW"] < 2 * state["AdamW(fused)"]
    assert all(one["median_ms"] > 0 for one in found["optimizers"].values())


@pytest.mark.slow
def test_shared_beginnings(long_model):
    found = bench(
        "bench_prefixes.py", long_model, "--length=2048", "--cases=b,c", "--rounds=1", "--steps=2"
    )
    for case in found["cases"].values():
        ours, without = case["shared"], case["unshared"]
        assert ours["losses"] == pytest.approx(without["losses"], rel=1e-4)
        assert ours["fewer_tokens"] > without["fewer_tokens"] == 1
        assert ours["examples_per_second"][0] > 0


@pytest.mark.slow
def test_attention_by_example():
    found = bench("bench_attention.py", "--rounds=1")["shapes"]
    assert len(found) >= 4
    assert all(shape["products_ms"] > 0 and shape["fused_ms"] > 0 for shape in found.values())


@pytest.mark.slow
def test_a_server_under_load(tiny, tmp_path):
    pytest.importorskip("fastapi")
    run_training(make_config(tiny(training={"max_steps": 1})), display=Display(enabled=False))
    options = ("--clients=1,3", "--requests=4", "--max-tokens=5")
    found = bench("bench_serve.py", str(tmp_path / "run"), *options, threads=False)["rows"]
    assert [(row["clients"], row["answers"]) for row in found] == [(1, 4), (3, 4)]
    assert all(row["tokens"] <= 20 and row["first_token_median"] > 0 for row in found)


@pytest.mark.slow
def test_reading_and_encoding(chat_file, long_model):
    data = (f"--data={chat_file}", long_model, "--records=60", "--before-records=60")
    found = bench("bench_encoding.py", *data, threads=False)
    assert {name: start["records"] for name, start in found.items()} == {
        "finetune, first": 60,
        "finetune, second": 60,
    }
    assert all(start["seconds"] > 0 for start in found.values())


@pytest.mark.slow
def test_the_parts_of_decoding_are_the_step(tiny, tmp_path):
    run_training(make_config(tiny(training={"max_steps": 1})), display=Display(enabled=False))
    found = bench("profile_decoding.py", str(tmp_path / "run"), "--prompts=1,5", "--tokens=20")
    for row in found["prompts"].values():
        assert row["ours"] > 0
        assert row["transformers"] > 0
        assert min(row["parts"].values()) > 0
        assert sum(row["parts"].values()) < 20 * row["ours"]


@pytest.mark.slow
def test_an_export(tiny, tmp_path):
    pytest.importorskip("xllamacpp")
    pairs = {"path": "package:translation.en-fr.train", "max_records": 40}
    data = {"train": pairs, "test": pairs | {"max_records": 6}, "max_length": 128}
    run_training(make_config(tiny(data=data)), display=Display(enabled=False))
    options = ("--sentences=4", "--tokens=6", "--frequent=0")
    found = bench("bench_export.py", str(tmp_path / "run"), *options)
    assert found["trimmed"]["parameters"] <= found["whole"]["parameters"]
    assert min(found["speed"]["llama_cpp_trimmed"]) > 0
    assert found["answers"]["same_within"] == 1
    assert found["batches"]["same"] == 1
    assert all(rate > 0 for rates in found["speed"].values() for rate in rates)


@pytest.mark.slow
def test_a_model_that_is_trimmed_first(model, tmp_path):
    pairs = files("finetune") / "resources" / "data"
    data = [
        f"--{part}={pairs / f'translation.en-fr.{part}.jsonl'}" for part in ("train", "validation")
    ]
    changes = ["training.max_steps=2", "data.max_length=96", "generation.max_new_tokens=4"]
    options = (*data, "--frequent=0", "--answers=4", "--set", *changes)
    found = bench("bench_trim_first.py", model, *options, threads=False)["contestants"]
    assert list(found) == ["trimmed", "active", "sampled"]
    for row in found.values():
        assert set(row) == {"bits_per_byte", "chrf", "bleu", "tokens_per_second", "peak_gb"}
        assert all(row[key][0] > 0 for key in ("bits_per_byte", "tokens_per_second", "peak_gb"))


@pytest.mark.slow
def test_the_grid_of_defaults_goes_on_where_it_stopped(model, tmp_path):
    pytest.importorskip("trl")
    results = tmp_path / "grid.jsonl"
    small = (model, f"--results={results}", "--records=12", "--seeds=0", "--tasks=chat")
    small += ("--set", "data.max_length=96")
    first = bench("grid_defaults.py", *small, "--parts=default,trl")
    ours, theirs = first["rows"]
    assert ours["changes"] == "data.max_length=96; the defaults"
    assert theirs["changes"] == "data.max_length=96; TRL's defaults"
    assert ours["chat"]["steps"] == 30, "three epochs of 10 examples, each a step"
    assert ours["chat"]["examples"] == 1
    assert theirs["chat"]["steps"] == 6, "three epochs of 12 examples, 8 a step"
    assert ours["chat"]["loss"] < theirs["chat"]["loss"]
    where = "data.max_length=96, chat, 12 records"
    assert first["bars"].keys() == {"best", "own"}
    assert all(reached[where] > 1 for reached in first["bars"].values()), "more steps fall further"
    kept = results.read_text()
    second = bench("grid_defaults.py", *small, "--parts=default,trl,length", "--minutes=0")
    assert second["rows"] == first["rows"]
    assert results.read_text() == kept, "nothing is run twice, and nothing without time"
    third = bench("grid_defaults.py", *small, "--parts=default,decay")
    assert len(third["rows"]) == 3, "the tables are of these parts"
    assert results.read_text().startswith(kept)


@pytest.mark.slow
def test_a_run_of_the_grid_that_a_signal_ends_has_no_result(model, tmp_path):
    results, place = tmp_path / "grid.jsonl", tmp_path / "place"
    place.mkdir()
    command = [sys.executable, str(SCRIPTS / "grid_defaults.py"), model, f"--results={results}"]
    command += ["--records=12", "--seeds=0", "--tasks=chat", "--parts=default", "--threads=1"]
    command += ["--set", "training.epochs=5000", "data.max_length=96"]
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(place)})
    until = time.monotonic() + 200
    while not any(path.stat().st_size for path in place.glob("*/run/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=100) == 130
    assert not results.exists()


@pytest.mark.slow
def test_what_is_learnt_in_equal_time(model, tmp_path):
    pytest.importorskip("trl")
    pairs = files("finetune") / "resources" / "data"
    data = [
        f"--{part}={pairs / f'translation.en-fr.{part}.jsonl'}" for part in ("train", "validation")
    ]
    names = "finetune:sampled,finetune-train,trl-lora"
    small = (model, *data, f"--out={tmp_path / 'out'}", "--quick", f"--contestants={names}")
    found = bench("bench_equal_time.py", *small, "--length=64")
    assert list(found["contestants"]) == ["untrained", *names.split(",")]
    assert set(found["rates"]) == {"finetune", "trl-lora"}
    untrained = found["contestants"].pop("untrained")
    for name, row in found["contestants"].items():
        assert row["loss"][0] < untrained["loss"][0] or name == "trl-lora"
        assert row["steps"][0] > 1
        assert row["peak_memory_gb"][0] > 0.1
        assert 0 <= row["chrf"][0] <= 100
    folder = tmp_path / "out" / "trl-lora" / "seed-0"
    result = json.loads((folder / "result.json").read_text())
    assert result["training_seconds"] >= 5
    assert 0 < len(result["answers"]) <= 8, "those whose prompts leave room for an answer"
    killed = [folder / "result.json", tmp_path / "out/finetune-train/seed-0/result.json"]
    for path in killed:
        path.unlink()  # as if it had been killed there
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    bench("bench_equal_time.py", *small, "--length=64")
    assert all(path.is_file() for path in killed)
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())
