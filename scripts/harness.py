"""How the speed benchmarks measure: a stopwatch over steps, a process for each contestant, the arguments, medians and spreads."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRL_MODES = ("trl-packed", "trl-wrapped", "trl-padded")
MODES = ("auto", "full", "active", "sampled", "frozen")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Stopwatch:
    """One entry a step: when it ended, and what was in it."""

    def __init__(self, clock: str, peak: Callable[[], int]) -> None:
        self.clock, self.read_peak = CLOCKS[clock], peak
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.phases: dict[str, float] = {}  # seconds in all
        self.peak = 0

    def step(self, loss: float | None = None) -> None:
        self.ends.append(self.clock())
        self.peak = self.read_peak()
        if loss is not None:
            self.losses.append(loss)

    def result(self, found: dict[str, Any]) -> dict[str, Any]:
        steps = len(self.ends)
        return {
            "seconds": [
                after - before for before, after in zip(self.ends, self.ends[1:], strict=False)
            ],
            "tokens": self.tokens[1:steps],  # the first step is only the start of the clock
            "targets": self.targets[1:steps],
            "tokens_trained": sum(self.tokens[:steps]),
            "peak_memory_bytes": self.peak,
            "losses": self.losses,
            "phases": self.phases,
            **found,
        }

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            started = self.clock()
            try:
                return function(*positional, **named)
            finally:
                self.phases[name] = self.phases.get(name, 0.0) + self.clock() - started

        return call


def in_process(
    args: argparse.Namespace, name: str, rows: int, length: int, **changed: Any
) -> dict[str, Any]:
    """Run one contestant in a process of its own and return what it measured; `changed` arguments are its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        given = {key: getattr(args, key) for key in COMMON} | {
            "worker": name,
            "rows": rows,
            "length": length,
            "folder": folder,
            "out": out,
        }
        given |= changed
        options = [
            f"--{key.replace('_', '-')}={value}"
            for key, value in given.items()
            if value is not None
        ]
        command = [sys.executable, str(Path(__file__).with_name("contestants.py")), *options]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ran.returncode:
            sys.exit(f"{name} failed:\n{ran.stdout[-4000:]}")
        return json.loads(out.read_text())


COMMON = (
    "model",
    "trl",
    "train",
    "validation",
    "unrelated",
    "steps",
    "seed",
    "lr",
    "held_out",
    "threads",
    "clock",
    "num_sampled",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of whole steps takes."""
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument(
        "--trl",
        type=Path,
        help="the folder that TRL was installed into; without it TRL is left out",
    )
    parser.add_argument(
        "--train",
        type=Path,
        help="a file to train on, in a format that `finetune` reads; default: shipped chat",
    )
    parser.add_argument("--validation", type=Path, help="the held-out file that goes with it")
    parser.add_argument(
        "--unrelated",
        type=Path,
        help="a .txt or .jsonl file of another kind, to see what is forgotten",
    )
    parser.add_argument(
        "--steps", type=int, default=7, help="optimizer steps a contestant and round"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--held-out", type=int, default=40, help="held-out examples")
    parser.add_argument("--threads", type=int, help="of torch, default: its own choice")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds, for a busy machine"
    )
    parser.add_argument("--num-sampled", type=int, default=4096, help="frozen rows in a sample")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop with a sentence where the arguments do not go together."""
    if args.clock == "cpu" and args.threads != 1:
        parser.error(
            "--clock cpu needs --threads 1: idle threads wait by spinning, and that would count"
        )
    known = {"finetune", "bare", "untrained", *TRL_MODES, *(f"finetune:{mode}" for mode in MODES)}
    if unknown := set(args.contestants) - known:
        parser.error(
            f"unknown contestants: {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
        )
    if (args.train is None) != (args.validation is None):
        parser.error("--train and --validation go together")
    if args.trl is None and set(args.contestants) & set(TRL_MODES):
        parser.error("TRL's contestants need --trl")


def median_rate(raw: dict[str, Any], what: str, warmup: int) -> float:
    """`what` (tokens or targets) a second: the median over the steps after the warm-up."""
    rates = [count / seconds for count, seconds in zip(raw[what], raw["seconds"], strict=True)]
    return statistics.median(rates[max(0, warmup - 1) :])  # the clock starts after the first step


def share_of_peak(raw: dict[str, Any], peak: dict[str, Any]) -> float:
    """What a contestant multiplies a second, attention left out, over the machine's best rate. Of ours the head is counted where it
    is multiplied; the others multiply all of it for each token."""
    flops = raw.get("flops", {"token": 6 * peak["multiplied_parameters"], "target": 0})
    return (
        flops["token"] * raw["tokens_per_second"] + flops["target"] * raw["targets_per_second"]
    ) / peak["flops"]


def spread(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]
