"""`finetune train --processes n`: a run in n processes of this machine, by torchrun's launcher.

The elastic launcher (https://docs.pytorch.org/docs/stable/distributed.elastic.html) starts the
processes, connects them, passes signals on, and ends all of them if one ends. It does not know two
things about a run. A user's mistake is not worth a second attempt, and a new attempt continues from
the newest complete checkpoint. So each attempt is one launch, and the attempts are counted here.
Each process is `python -m finetune.recipes.train.worker`.
"""

import json
import logging
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from finetune.config import dump_config, load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.run.files import path_of, write_text
from finetune.run.folder import (
    MARK,
    RunDir,
    is_complete,
    newest_checkpoint,
    step_folders,
    step_of,
)

USER_ERROR, SIGNALLED = 2, 130  # exit codes of a worker, as of the command line
SAVING_TIME = 600  # seconds that the processes have to save after a signal, before they are killed
SAME_EVENT = 10.0  # seconds: what fails later was ended by the launcher


_LOST = re.compile(r"connection|socket|gloo|nccl", re.I)  # what fails if another process ended


class ProcessFailed(RuntimeError):
    """The end of a run in which a process died or raised. The message names the process."""


class StopFailed(ProcessFailed):
    """An error while the processes saved after a signal, so there is no restart."""


def launch_training(
    config: Path,
    overrides: Sequence[str],
    *,
    processes: str,
    restarts: int,
    resume: str | None = None,
    dry_run: bool = False,
    display: Display | None = None,
) -> Literal["finished", "signal"]:
    """Run `run_training` in several processes, and again up to `restarts` times after a failure.

    The config is read once, so that every process and every restart has the same.
    `processes` is "auto" or a number. Raises UserError, also for one raised in a process, and
    ProcessFailed.
    """
    settings, display = load_config(config, overrides), display or Display()
    count = number_of_processes(processes, settings.training.device)
    if restarts and settings.overwrite_output_dir:
        raise UserError(
            "--restarts continues the run in output_dir, and overwrite_output_dir deletes it. "
            "Leave one of the two out"
        )
    run, text = RunDir(settings.output_dir), dump_config(settings)
    task = {"resume": resume, "dry_run": dry_run, "command": sys.argv}
    later = _later_ones(run, resume)
    for restart in range(restarts + 1):
        try:
            return _launch(task, text, count)
        except ProcessFailed as error:
            newest = newest_checkpoint(run.checkpoints)
            if later.items() & _marks(run).items():  # it died before it went on
                newest = path_of(str(resume))
            elif newest is not None or resume is None:
                task["resume"] = "auto"
            if restart < restarts and not isinstance(error, StopFailed):
                display.say(
                    f"{error}; restart {restart + 1} of {restarts}, from "
                    f"{newest or 'the beginning'}"
                )
            else:
                saved = f"{newest} is saved: --resume {task['resume']}"
                said = saved if newest else "no step was saved"
                raise ProcessFailed(f"{error}; {said}") from None
    raise AssertionError


def _later_ones(run: RunDir, resume: str | None) -> dict[Path, int]:
    """Return the checkpoints that the run deletes when it goes on from the one named `resume`."""
    if resume is None or resume == "auto" or not is_complete(named := path_of(resume)):
        return {}
    later = {path: mark for path, mark in _marks(run).items() if step_of(path) > step_of(named)}
    return later if run.holds(named) else {}


def _marks(run: RunDir) -> dict[Path, int]:
    """Return the complete checkpoints of the run, and when each was written, in nanoseconds."""
    found = filter(is_complete, step_folders(run.checkpoints).values())
    return {folder: (folder / MARK).stat().st_mtime_ns for folder in found}


def number_of_processes(given: str, device: str) -> int:
    """Return the number that `--processes` means on this machine. Raises UserError.

    `device` is training.device: GPUs count only if the processes are to run on them.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            "this process was itself started by a launcher (WORLD_SIZE is set). "
            "Leave --processes and --restarts out"
        )
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    most = f" to {gpus}, the GPUs of this machine" if gpus else ""
    allowed = f"auto, or a number of processes from 1{most}"
    if given == "auto":
        return gpus or 1
    if not given.isdecimal() or int(given) < 1 or (gpus and int(given) > gpus):
        raise UserError(f"--processes is {given!r}. Give {allowed}")
    return int(given)


def _launch(task: Mapping[str, object], config: str, count: int) -> Literal["finished", "signal"]:
    """Launch the processes with the text of a config, which they read from a file of ours."""
    with tempfile.TemporaryDirectory(prefix="finetune-") as logs:
        path = Path(logs) / "settings.yaml"
        write_text(path, config)
        return _launch_with({**task, "config": str(path)}, count, Path(logs))


def _launch_with(
    task: Mapping[str, object], count: int, logs: Path
) -> Literal["finished", "signal"]:
    """Launch the processes. Each writes the error that ends it to a file below `logs`."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=SAVING_TIME,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
    )
    # what it would log is reported below
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with _threads(count):
            elastic_launch(config, sys.executable)(
                "-m", "finetune.recipes.train.worker", json.dumps(task)
            )
    except SignalException:
        _raise_recorded(logs)
        return "signal"
    except ChildFailedError as error:
        rank, failure = root_cause(error.failures)
        if failure.exitcode == SIGNALLED:
            return "signal"
        if failure.exitcode == USER_ERROR:
            raise UserError(mistake_of(failure)) from None
        _print_traceback(failure)
        raise ProcessFailed(
            f"process {rank} (of 0 to {count - 1}) {_what_happened(failure)}"
        ) from None
    return "finished"


def _raise_recorded(logs: Path) -> None:
    """Raise what went wrong after a signal, such as a disk that refuses the last checkpoint.

    An error that follows from the end of another process does not count.
    """
    recorded = [json.loads(file.read_bytes()) for file in sorted(logs.rglob("error.json"))]
    for record in recorded:
        kind, _, sentence = record["message"]["message"].partition(": ")
        if kind == UserError.__name__:
            raise UserError(sentence) from None
    for record in recorded:
        said = record["message"]["message"]
        if not _LOST.search(said):
            print(record["message"]["extraInfo"]["py_callstack"], file=sys.stderr, end="")
            raise StopFailed(f"the run could not be saved when it was stopped: {said}") from None


@contextmanager
def _threads(count: int):
    """Give each process its share of the cores, unless the user has set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // count))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def root_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the rank that brought the others down, and its failure.

    If one process dies, the others lose their connection to it and raise errors of their own at the
    same moment. So a death counts before a user's mistake, and a mistake before any other error.
    Processes that the launcher ends die later.
    """

    def kind(failure: ProcessFailure) -> int:
        if failure.exitcode in (SIGNALLED, -signal.SIGTERM):
            return 3
        return 0 if failure.exitcode < 0 else 1 if failure.exitcode == USER_ERROR else 2

    first = min(map(_when, failures.values()))
    together = {
        rank: failure for rank, failure in failures.items() if _when(failure) < first + SAME_EVENT
    }
    return min(together.items(), key=lambda item: (kind(item[1]), _when(item[1]), item[0]))


def _when(failure: ProcessFailure) -> float:
    """Return when the process failed, to the microsecond if it left a record."""
    return (
        os.path.getmtime(failure.error_file)
        if os.path.isfile(failure.error_file)
        else float(failure.timestamp)
    )


def _what_happened(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        killed = failure.exitcode == -signal.SIGKILL
        hint = " (the system does that if memory runs out)" if killed else ""
        return f"was killed by {failure.signal_name()}{hint}"
    if isinstance(failure.message, dict):
        return f"failed: {failure.message['message']}"
    return f"ended with exit code {failure.exitcode}"


def mistake_of(failure: ProcessFailure) -> str:
    """Return the sentence of a user's mistake, without the name of the error before it."""
    assert isinstance(failure.message, dict), failure.message
    return str(failure.message["message"]).partition(": ")[2]


def _print_traceback(failure: ProcessFailure) -> None:
    """Print the traceback that the process recorded, if it did."""
    if isinstance(failure.message, dict):
        print(failure.message["extraInfo"]["py_callstack"], file=sys.stderr, end="")
