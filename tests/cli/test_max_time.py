"""A run that a time ends: its schedule, its resume, its evaluations, and what plan says of it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.config.loading import make_config
from finetune.config.values import seconds_of
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.train.train import run_training
from finetune.run.folder import RunDir, complete_steps
from finetune.run.records import Evaluation, StepRecord, read_metrics
from finetune.training import clock
from finetune.training.clock import Clock
from tests.cli.conftest import finetune


@pytest.fixture
def ten_seconds_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each look at the clock be ten seconds after the one before."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 10.0
        return now[0]

    monkeypatch.setattr(clock, "monotonic", monotonic)


def train(tree: dict[str, Any], **options: Any) -> tuple[str, list[StepRecord]]:
    stopped = run_training(make_config(tree), display=Display(enabled=False), **options)
    return stopped, steps_of(Path(tree["output_dir"]))


def steps_of(run: Path) -> list[StepRecord]:
    return [record for record in read_metrics(RunDir(run))[0] if isinstance(record, StepRecord)]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("15min", 900), ("2h", 7200), ("90", 90), ("1h 30min", 5400), ("45 s", 45), (12, 12),
     ("0.5h", 1800), ("3 m", 180)],
)  # fmt: skip
def test_times(given: Any, seconds: float) -> None:
    assert float(seconds_of(given)) == seconds


@pytest.mark.parametrize("given", ["soon", "15 minutes ago", "1h or so", "min", "-3", "0", "inf"])
def test_what_is_no_time(given: str, tiny) -> None:
    with pytest.raises(UserError, match=r"max_time|the time"):
        make_config(tiny(training={"max_time": given}))


def test_a_run_ends_with_its_time_and_the_schedule_follows(ten_seconds_a_look, tiny) -> None:
    tree = tiny(
        training={"max_time": "100s", "max_steps": None, "epochs": 0.1},
        scheduler={"warmup_ratio": 0.0},
        evaluation={"every": 4},
    )
    stopped, steps = train(tree)
    assert stopped == "finished"
    assert len(steps) == 10, "the epochs do not count"
    base = tree["optimizer"]["lr"]
    assert [step.lr / base for step in steps] == pytest.approx([1 - n / 10 for n in range(10)],
                                                               abs=1e-4)  # fmt: skip
    run = RunDir(Path(tree["output_dir"]))
    evaluated = [r.step for r in read_metrics(run)[0] if isinstance(r, Evaluation)]
    assert evaluated == [4, 8, 10]
    assert (run.model / "config.json").is_file()


def test_a_stream_is_saved_after_each_tenth_of_its_time(ten_seconds_a_look, tiny) -> None:
    """The time of an evaluation, here ten seconds, is not that until the next one."""
    tree = tiny(
        data={"streaming": True, "validation_fraction": 0.0},
        training={"max_time": 1000, "max_steps": None},
        checkpoint={"keep": 99},
    )
    stopped, steps = train(tree)
    assert (stopped, len(steps)) == ("finished", 91)
    saved = complete_steps(RunDir(Path(tree["output_dir"])).checkpoints)
    assert saved == [*range(10, 91, 10), 91]


def test_the_earlier_of_time_and_steps_ends_it(ten_seconds_a_look, tiny) -> None:
    tree = tiny(training={"max_time": 1000, "max_steps": 4}, scheduler={"warmup_ratio": 0.0})
    stopped, steps = train(tree)
    assert (stopped, len(steps)) == ("finished", 4)
    shares = [step.lr / tree["optimizer"]["lr"] for step in steps]
    assert shares == pytest.approx([1, 0.75, 0.5, 0.25], abs=1e-4), "the schedule ends with it"


def test_a_resume_counts_the_time_used(ten_seconds_a_look, tiny, monkeypatch) -> None:
    tree = tiny(training={"max_time": 100, "max_steps": None}, checkpoint={"every": 1})

    class Killed(BaseException): ...

    def kill(record: Any) -> None:
        if record.step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(tree, listener=kill)
    stopped, steps = train(tree, resume="auto")
    assert stopped == "finished"
    assert [step.step for step in steps] == list(range(1, 11))
    again, same = train(tree, resume="auto")
    assert (again, len(same)) == ("finished", 10)
    tree["training"]["max_time"] = 150
    _, more = train(tree, resume="auto")
    assert len(more) == 15


def test_what_time_does_not_go_with(tiny, folder, write_config) -> None:
    with pytest.raises(UserError, match=r"Set scheduler\.warmup_ratio"):
        train(tiny(training={"max_time": 9}, scheduler={"warmup_steps": 3}))
    write_config(training={"max_time": 60})
    result = finetune("tune", "c.yaml", "--trials", "1")
    assert result.code == 2
    assert "training.max_time would give each run another number of steps" in result.err


def test_plan_says_how_many_steps_fit(folder, write_config) -> None:
    write_config(training={"max_time": "2min", "max_steps": None})
    result = finetune("plan", "c.yaml")
    assert result.code == 0, result.err
    (steps,) = re.findall(r"^ *steps +([\d,]+)", result.out, flags=re.M)
    assert 10 < int(steps.replace(",", "")) < 1_000_000
    (whole,) = re.findall(r"training +([\d.]+) (s|min)", result.out)
    assert float(whole[0]) * (60 if whole[1] == "min" else 1) < 130
    dry = finetune("train", "c.yaml", "--dry-run")
    assert "everything is in order: steps for 2 min 00 s" in dry.err


def test_processes_read_one_time() -> None:
    class Two:
        num_processes, device = 2, "cpu"

        def reduce(self, seconds, reduction):
            assert reduction == "mean"
            return (seconds + 30.0) / 2

    found = Clock(60, Two())  # type: ignore[arg-type]
    found.start(10.0)
    assert 20 <= found.read() < 21


@pytest.mark.slow  # two processes
def test_processes_end_together(folder, write_config) -> None:
    write_config(training={"max_time": 2, "max_steps": None}, evaluation={"every": 50})
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "train", "c.yaml", "--processes", "2"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = steps_of(folder / "run")
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert len(steps) > 1
    assert steps[-1].lr < 0.5 * steps[1].lr
