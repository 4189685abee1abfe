"""The command line in forked children of a warm process, so that the imports are paid for once."""

import contextlib
import gc
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

TRACEBACK = "Traceback (most recent call last)"
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "COLUMNS": "200",
}
MEMORY = 12 << 30  # bytes of addresses; importing torch takes some of them


@dataclass(frozen=True)
class Ended:
    """A command that has ended. `code` is negative for a signal, and None if it took too long."""

    code: int | None
    output: str  # stdout and stderr
    seconds: float

    @property
    def verdict(self) -> str:
        """How it ended: "fine", "sentence", "traceback", "crash", "hang", or the exit code."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        if self.code is None:
            return "hang"
        if TRACEBACK in self.output or "panicked at" in self.output:
            return "traceback"
        if self.code < 0:
            return "crash"
        if self.code == 2 and any(line.startswith("finetune: ") for line in lines):
            return "sentence"
        return "fine" if self.code == 0 else f"exit code {self.code}"


def warm() -> None:
    """Import everything that a command imports, and what transformers imports for a model."""
    os.environ.update(SETTINGS)
    for name in (
        "finetune.cli",
        *(
            f"finetune.recipes.{command}"
            for command in (
                *("train.train", "compare.compare", "plan.plan", "inspect", "evaluate", "generate"),
                *("translate", "export"),
            )
        ),
        *("finetune.report", "finetune.models.adapters", "peft", "sacrebleu", "optuna"),
        *("torch.distributed.checkpoint", "datasets.packaged_modules.parquet.parquet"),
        *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt_neox")),
        "transformers.models.gpt2.configuration_gpt2",
        "transformers.integrations.gguf.reader",
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that the children share these pages


def import_what(arguments: list[str], folder: Path) -> Ended:
    """Run a command in a child, and then import here what it has imported there."""
    before, listed = set(sys.modules), folder / "modules.txt"

    def listing() -> Callable[[], None]:
        return lambda: (listed.write_text("\n".join(set(sys.modules) - before)), None)[1]

    ended = run(arguments, folder, before=listing)
    for name in listed.read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    listed.unlink()
    gc.collect()
    gc.freeze()
    return ended


def start(
    arguments: list[str],
    folder: Path,
    *,
    log: Path,
    before: Callable[[], Callable[[], None] | None] = lambda: None,
    environment: Mapping[str, str] | None = None,
    seconds_of_cpu: int = 120,
) -> int:
    """Start `finetune ARGUMENTS` in `folder`, and return the process. It leads a group of its own.

    `before` is called in the child first; what it returns is called after the command.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        os.chdir(folder)
        _redirect(log)
        os.environ.update(environment or {})
        resource.setrlimit(resource.RLIMIT_CPU, (seconds_of_cpu, seconds_of_cpu + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.argv = ["finetune", *arguments]
        after = before()
        code = _command()
        if after is not None:
            after()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _redirect(log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115


def _command() -> int:
    from finetune.cli import main

    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(pid: int, log: Path, *, timeout: float = 300.0) -> Ended:
    """Wait for a process that `start` started. It is killed after `timeout` seconds."""
    began = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code: int | None = os.waitstatus_to_exitcode(status)
            code = None if code == -signal.SIGXCPU else code
            break
        if time.monotonic() - began > timeout:
            kill_group(pid)
            os.waitpid(pid, 0)
            code = None
            break
        time.sleep(0.003)
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return Ended(code, output, time.monotonic() - began)


def kill_group(pid: int) -> None:
    """Kill a process that `start` started, and all that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet, or has ended
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run(arguments: list[str], folder: Path, *, log: Path | None = None, **options: object) -> Ended:
    """Run `finetune ARGUMENTS` in `folder` to its end; `options` as for `start`."""
    log = log or folder / "log.txt"
    return wait(start(arguments, folder, log=log, **options), log)  # type: ignore[arg-type]
