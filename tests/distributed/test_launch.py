"""`finetune train --processes n`: the result is that of one process; deaths and signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from finetune.config.loading import dump_config, load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.train.launch import (
    USER_ERROR,
    launch_training,
    mistake_of,
    number_of_processes,
    root_cause,
)
from finetune.recipes.train.train import run_training
from finetune.recipes.train.worker import work
from finetune.training.stopping import StopSignal
from tests.conftest import PYTHIA, conversation

SITE = """
import os, pathlib, signal
if "RANK" in os.environ:
    from finetune.training.trainer import Trainer
    step, first_time = Trainer._step, not pathlib.Path("killed").exists()
    def step_with_an_accident(self, *args, **kwargs):
        if first_time and os.environ["RANK"] == "1" and self.progress.step == 5:
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if not first_time and os.environ["RANK"] == "0" and self.progress.step == 7:
            os.kill(os.getppid(), signal.SIGINT)  # as a terminal does on Ctrl-C: to the launcher
        return step(self, *args, **kwargs)
    Trainer._step = step_with_an_accident
"""  # Python runs sitecustomize.py when it starts
NUM_STEPS = 12
ROOT = Path(__file__).parents[2]


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Make c.yaml, a lazily trained model, and whole/, its run in one process.

    A step has four micro-batches, and every third step is saved.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(48))
    )
    tree = {
        "model": {"config": {**PYTHIA, "hidden_dropout": 0.0}, "tokenizer": {"vocab_size": 300}},
        "data": {"train": "chat.jsonl", "validation_fraction": 0.1, "max_length": 64},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "no_decay": []},
        "training": {
            "max_steps": NUM_STEPS,
            "batch_size": 4,
            "micro_batch_size": 1,
            "timeout": 60,
            "precision": "fp32",
        },
        "checkpoint": {"every": 3},
        "evaluation": {"every": NUM_STEPS, "samples": 0, "generate": 0, "before": False},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    run_training(load_config(Path("c.yaml"), ["output_dir=whole"]), display=Display(enabled=False))
    return tmp_path


@pytest.mark.slow
def test_a_death_is_named_and_restarted_and_ctrl_c_saves_what_one_process_ends(folder):
    """Process 1 is killed in step 6, the restart stops after step 8, one process does the rest."""
    (folder / "sitecustomize.py").write_text(SITE)
    command = [
        sys.executable,
        "-m",
        "finetune",
        "train",
        "c.yaml",
        "output_dir=run",
        "--processes",
        "2",
        "--restarts",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 130, done.stdout
    named = "process 1 (of 0 to 1) was killed by SIGKILL (the system does that if memory runs out)"
    assert f"{named}; restart 1 of 1, from run/checkpoints/step-00000003" in done.stdout
    assert "resuming after step 3" in done.stdout
    steps = len(losses(folder / "run"))
    assert 8 <= steps < NUM_STEPS
    assert f"stopped at step {steps}, which is saved. Go on with --resume auto" in done.stdout
    assert "Traceback" not in done.stdout  # of the process that lost the other
    record = json.loads((folder / "run" / "environment.json").read_text())
    assert record["processes"] == 2
    assert (
        record["command"]
        == "python -m finetune train c.yaml output_dir=run --processes 2 --restarts 1"
    )
    config = load_config(Path("c.yaml"), ["output_dir=run"])
    assert run_training(config, resume="auto", display=Display(enabled=False)) == "finished"
    assert losses(folder / "run") == pytest.approx(losses(folder / "whole"), abs=1e-5)
    assert len(losses(folder / "run")) == NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            "OSError(28, 'No space left on device')",
            2,
            r"the checkpoint of step [12] could not be written to run/checkpoints: No space left",
        ),
        (
            "ArithmeticError('a bug')",
            1,
            r"finetune: the run could not be saved when it was stopped: ArithmeticError: a bug",
        ),
    ],
)
def test_a_last_checkpoint_that_cannot_be_written_is_told_after_ctrl_c(folder, error, code, said):
    (folder / "sitecustomize.py").write_text(
        SITE.replace("== 7", "== 0")
        .replace("not pathlib", "False and pathlib")
        .replace("on Ctrl-C: to the launcher", "\n            import time; time.sleep(2)")
        + f"""
    from finetune.training import checkpoint
    def refuse(path, content):
        raise {error}
    checkpoint._write_file = refuse
"""
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "finetune", "train", "c.yaml"),
            "output_dir=run",
            "--processes=2",
            "--restarts=1",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    assert len(re.findall(said, done.stderr)) == 1
    assert ("Traceback" in done.stderr) == (code == 1)
    assert "restart 1" not in done.stderr


DEATH_BEFORE_THE_FIRST_STEP = """
import os, pathlib, signal
if "RANK" in os.environ and not pathlib.Path("killed").exists():
    from finetune.training.trainer import Trainer
    def die(self, *args):
        pathlib.Path("killed").touch()
        pathlib.Path("c.yaml").write_text("model: {name: another}")  # it is edited meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    Trainer.resume = die
"""


@pytest.mark.slow
def test_a_restart_begins_where_the_start_was_to_with_the_config_as_it_was(folder):
    """The run goes back to step 9 of 12. The first attempt dies before step 12 is deleted."""
    (folder / "sitecustomize.py").write_text(DEATH_BEFORE_THE_FIRST_STEP)
    whole = losses(folder / "whole")
    back = "whole/checkpoints/step-00000009"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "finetune", "train", "c.yaml", "output_dir=whole"),
            *("--resume", back, "--processes=1", "--restarts=1"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"restart 1 of 1, from {back}" in done.stderr
    assert "resuming after step 9" in done.stderr
    assert losses(folder / "whole") == whole


def task_in(folder: Path, output_dir: str) -> dict:
    """Return what a launcher gives to a process."""
    settings = load_config(Path("c.yaml"), [f"output_dir={output_dir}"])
    (folder / "settings.yaml").write_text(dump_config(settings))
    return {
        "config": str(folder / "settings.yaml"),
        "resume": None,
        "dry_run": False,
        "command": ["finetune"],
    }


def test_a_worker_records_what_goes_wrong_for_the_launcher(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert work(task_in(folder, "whole")) == USER_ERROR
    failure = ProcessFailure(
        local_rank=0, pid=1, exitcode=USER_ERROR, error_file=str(folder / "error.json")
    )
    said = mistake_of(failure)
    assert said.startswith("whole holds a run already. Continue it with --resume auto")


def test_a_disk_that_is_full_is_a_sentence_for_the_launcher_too(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    (folder / "run").mkdir()
    (folder / "run" / ".environment.json.tmp").symlink_to("/dev/full")
    assert work(task_in(folder, "run")) == USER_ERROR
    failure = ProcessFailure(
        local_rank=0, pid=1, exitcode=USER_ERROR, error_file=str(folder / "error.json")
    )
    said = (
        "run/environment.json could not be written: No space left on device; "
        "there is no checkpoint yet"
    )
    assert mistake_of(failure) == said


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", ""])
def test_what_the_number_of_processes_may_be(given):
    with pytest.raises(
        UserError, match=r"--processes is .*\. Give auto, or a number of processes from 1"
    ):
        number_of_processes(given, "auto")


def test_auto_is_one_process_without_a_gpu_and_no_launcher_starts_another(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert number_of_processes("auto", "auto") == 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert number_of_processes("auto", "auto") == number_of_processes("auto", "cuda") == 8
    with pytest.raises(UserError, match="from 1 to 8, the GPUs of this machine"):
        number_of_processes("9", "auto")
    assert (number_of_processes("auto", "cpu"), number_of_processes("9", "cpu")) == (1, 9)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started by a launcher"):
        number_of_processes("auto", "auto")


def test_restarts_and_overwriting_exclude_each_other(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="Leave one of the two out"):
        launch_training(Path("c.yaml"), ["overwrite_output_dir=true"], processes="2", restarts=1)


def failure(
    folder: Path, rank: int, exitcode: int, *, recorded: bool = False, later: float = 0.0
) -> ProcessFailure:
    file = folder / f"{len(list(folder.iterdir()))}.json"
    if recorded:
        extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
        file.write_text(json.dumps({"message": {"message": f"Error: {rank}", "extraInfo": extra}}))
        os.utime(file, (time.time() + later,) * 2)
    found = ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(file))
    if not recorded:
        found.timestamp += round(later)
    return found


def test_the_root_of_several_failures(tmp_path):
    lost = failure(tmp_path, 0, 1, recorded=True)
    assert (
        root_cause({0: lost, 1: failure(tmp_path, 1, -9)})[0] == 1
    )  # the death, not the connection lost by it
    assert (
        root_cause(
            {
                0: failure(tmp_path, 0, 1, recorded=True, later=0.2),
                1: failure(tmp_path, 1, 1, recorded=True),
            }
        )[0]
        == 1
    )
    assert (
        root_cause({0: lost, 1: failure(tmp_path, 1, 2, recorded=True, later=0.2)})[0] == 1
    )  # a user's mistake says more
    assert (
        root_cause(
            {0: failure(tmp_path, 0, -9, later=30), 1: failure(tmp_path, 1, 1, recorded=True)}
        )[0]
        == 1
    )  # hung, then killed
    assert (
        root_cause({0: failure(tmp_path, 0, -15), 1: failure(tmp_path, 1, 1, recorded=True)})[0]
        == 1
    )  # told to end


def test_under_a_launcher_a_second_signal_does_not_cut_the_saving_short(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
