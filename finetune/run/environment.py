"""The circumstances of a run: versions, machine, command line, start time."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

from finetune.run.records import Environment

PACKAGES = (
    "finetune-rows",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "peft",
    "safetensors",
    "sacrebleu",
)


def collect_environment(*, processes: int, device: str, precision: str) -> Environment:
    """Return the record of this process. The caller adds the model's facts and the notes."""
    return Environment(
        command=command_line(),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        processes=processes,
        device=device,
        precision=precision,
        machine={
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
            "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    )


def command_line() -> str:
    """Return the command line of this process, in a form that can be typed again."""
    name = Path(sys.argv[0]).name
    started = ["python", "-m", Path(sys.argv[0]).parent.name] if name == "__main__.py" else [name]
    return shlex.join([*started, *sys.argv[1:]])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
