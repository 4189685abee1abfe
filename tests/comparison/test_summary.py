"""From runs made by hand to the comparison: curves, targets, misses, divergence."""

import math

import pytest

from finetune.comparison.summary import summarise, target_loss
from finetune.run.folder import RunDir
from finetune.run.trials import Point, Result, Run, read_trial
from tests.comparison.conftest import BINS, made_run


def two(**changes):
    tuning = {"adam": [made_run("adam", 0, lr, [4.0, 3.0, 2.0]) for lr in (1e-4, 1e-3, 1e-2)]}
    tuning["sgd"] = [made_run("sgd", 0, lr, [4.0, 3.5, 3.0]) for lr in (0.1, 0.3, 1.0, 3.0)]
    reported = {
        "adam": [
            made_run("adam", seed, 1e-3, [4.0, 3.0, 2.0 + 0.01 * seed], reported=True)
            for seed in (1, 2, 3)
        ],
        "sgd": [
            made_run("sgd", seed, 0.3, [4.0, 3.5, 3.0 + 0.01 * seed], reported=True)
            for seed in (1, 2, 3)
        ],
    }
    return summarise(tuning, reported | changes, grid_size=3)


def test_the_target_lies_on_the_way_to_the_best():
    reported = {
        "adam": [made_run("adam", 1, 1e-3, [4.0, 2.0], reported=True)],
        "sgd": [made_run("sgd", 1, 1.0, [4.0, 3.0], reported=True)],
    }
    assert target_loss(reported) == pytest.approx(4.0 - 0.9 * 2.0)
    assert target_loss({"sgd": [made_run("sgd", 1, 1.0, [4.0, 4.5], reported=True)]}) is None


def test_steps_to_the_target_and_misses():
    found = two()
    adam, sgd = found["optimizers"]["adam"], found["optimizers"]["sgd"]
    assert adam["to_target"] == {"reached": 3, "steps": 20.0, "tokens": 2000.0, "seconds": 2.0}
    assert sgd["to_target"] == {"reached": 0, "steps": None, "tokens": None, "seconds": None}
    assert found["verdict"]["winner"] == "adam"
    assert sgd["difference_to_best"]["mean"] == pytest.approx(1.0)
    assert adam["difference_to_best"] is None


def test_widening_is_counted_and_an_edge_is_named():
    rows = two()["optimizers"]
    assert (rows["sgd"]["tuning_trials"], rows["sgd"]["widenings"], rows["sgd"]["at_edge"]) == (
        4,
        1,
        False,
    )
    assert (rows["adam"]["tuning_trials"], rows["adam"]["widenings"]) == (3, 0)
    assert [run["widening"] for run in two()["runs"]].count(True) == 1


def test_curves_are_means_with_their_range():
    curve = two()["optimizers"]["adam"]["curve"]
    assert curve[-1] == {
        "step": 20,
        "loss": pytest.approx(2.02),
        "lowest": 2.01,
        "highest": 2.03,
        "tokens": 2000.0,
        "seconds": 2.0,
    }


def test_a_diverged_run_stays_in_the_count_and_takes_the_mean_away():
    lost = [
        *(made_run("sgd", seed, 0.3, [4.0, 3.5, 3.0], reported=True) for seed in (1, 2)),
        made_run("sgd", 3, 0.3, [4.0], reported=True, problem="the loss is nan"),
    ]
    found = two(sgd=lost)
    row = found["optimizers"]["sgd"]
    assert (row["reported_diverged"], row["reported_runs"]) == (1, 3)
    assert (
        row["test"]
        is row["validation"]
        is row["test_by_frequency"]
        is row["difference_to_best"]
        is None
    )
    assert len(row["curve"]) == 1  # as far as every seed has one
    assert "sgd (1 diverged)" in found["verdict"]["sentences"][-1]
    assert sum(run["diverged"] for run in found["runs"]) == 1
    assert len(found["runs"]) == 13


def test_a_loss_that_is_no_number_at_the_end_is_divergence():
    assert made_run("sgd", 1, 1.0, [4.0, math.nan], reported=True).diverged


def test_a_run_is_read_from_its_folder(tmp_path):
    assert read_trial(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "evaluation": {"loss": 4.0}}\n'
        '{"step": 1, "loss": 4.0, "num_tokens": 100, "seconds": 0.5}\n'
        '{"step": 2, "loss": 3.0, "num_tokens": 50, "seconds": 0.25}\n'
        '{"step": 2, "evaluation": {"loss": "inf"}}\n'
    )
    (tmp_path / "updates.jsonl").write_text(
        '{"step": 1, "ratio": 0.1}\n{"step": 2, "ratio": 0.3}\n{"step": 2, "ratio": 0.2}\n{"st'
    )
    result = Result("adam", "reported", 1, {"lr": 1e-3}, "", {}, 16, {"all": 2.0}, BINS)
    result.write(RunDir(tmp_path))
    run = read_trial(tmp_path)
    assert isinstance(run, Run)
    assert run.result == result
    assert run.points == [Point(0, 4.0, 0, 0.0), Point(2, math.inf, 150, 0.75)]
    assert run.updates == [(1, 0.1), (2, 0.2)]
    assert run.diverged
    assert run.loss == math.inf


def test_a_test_loss_that_is_no_number_is_divergence():
    """The held-out loss was fine: one text of the test data was not."""
    lost = made_run("sgd", 3, 0.3, [4.0, 3.5, 3.0], reported=True)
    lost.result.test["all"] = math.inf
    kept = [made_run("sgd", seed, 0.3, [4.0, 3.5, 3.0], reported=True) for seed in (1, 2)]
    found = two(sgd=[*kept, lost])
    assert found["optimizers"]["sgd"]["reported_diverged"] == 1
    assert found["verdict"]["winner"] == "adam"
