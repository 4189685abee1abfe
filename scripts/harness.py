"""How the speed benchmarks measure: a stopwatch, processes, arguments, medians and spreads."""

import argparse
import itertools
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
    """When each step ended, and what was in it.

    `clock`: a key of CLOCKS. `peak` returns the bytes in use at most so far.
    """

    def __init__(self, clock: str, peak: Callable[[], int]) -> None:
        self.clock, self.read_peak = CLOCKS[clock], peak
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.phases: dict[str, float] = {}  # seconds of all steps together
        self.peak = 0

    def step(self, loss: float | None = None) -> None:
        """Take the time at the end of a step."""
        self.ends.append(self.clock())
        self.peak = self.read_peak()
        if loss is not None:
            self.losses.append(loss)

    def result(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return what was measured, and `found`. The end of the first step starts the clock."""
        steps = len(self.ends)
        return {
            "seconds": [after - before for before, after in itertools.pairwise(self.ends)],
            "tokens": self.tokens[1:steps],
            "targets": self.targets[1:steps],
            "tokens_trained": sum(self.tokens[:steps]),
            "peak_memory_bytes": self.peak,
            "losses": self.losses,
            "phases": self.phases,
            **found,
        }

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, whose seconds are added up in the phase `name`."""

        def call(*positional: Any, **named: Any) -> Any:
            started = self.clock()
            try:
                return function(*positional, **named)
            finally:
                self.phases[name] = self.phases.get(name, 0.0) + self.clock() - started

        return call


def in_process(
    args: argparse.Namespace, name: str, sequences: int, length: int, **changed: Any
) -> dict[str, Any]:
    """Run one contestant in a process of its own, and return what it measured.

    `changed`: arguments that differ from those in `args`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        given = {key: getattr(args, key) for key in COMMON} | {
            "worker": name,
            "sequences": sequences,
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
    "precision",
    "num_sampled",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark of whole steps takes."""
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument(
        "--trl",
        type=Path,
        help="the folder into which TRL was installed; without it TRL is left out",
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
        help="a .txt or .jsonl file of another kind, to measure what is forgotten",
    )
    parser.add_argument(
        "--steps", type=int, default=7, help="optimizer steps of a contestant in a round"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--held-out", type=int, default=40, help="held-out records")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds, for a busy machine"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of matrix products; auto: bf16 where the machine has instructions for it",
    )
    parser.add_argument("--num-sampled", type=int, default=4096, help="frozen rows that are drawn")


def add_shape(parser: argparse.ArgumentParser, *, length: int) -> None:
    """Add the shape of a step's batch."""
    parser.add_argument("--sequences", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=length, help="tokens of a sequence")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop with a sentence if the arguments do not go together."""
    if args.clock == "cpu" and args.threads != 1:
        parser.error(
            "--clock cpu needs --threads 1: idle threads wait by spinning, which would count"
        )
    known = {"finetune", "bare", "untrained", *TRL_MODES, *(f"finetune:{mode}" for mode in MODES)}
    if unknown := set(args.contestants) - known:
        parser.error(
            f"unknown contestants: {', '.join(sorted(unknown))}; known are "
            f"{', '.join(sorted(known))}"
        )
    if (args.train is None) != (args.validation is None):
        parser.error("--train and --validation go together")
    if args.trl is None and set(args.contestants) & set(TRL_MODES):
        parser.error("TRL's contestants need --trl")


def median_rate(raw: dict[str, Any], what: str, warmup: int) -> float:
    """Return `what` (tokens or targets) per second: the median over the steps after the warm-up."""
    rates = [count / seconds for count, seconds in zip(raw[what], raw["seconds"], strict=True)]
    return statistics.median(rates[max(0, warmup - 1) :])  # the first step is not among the rates


def share_of_peak(raw: dict[str, Any], peak: dict[str, Any]) -> float:
    """Return a contestant's rate of matrix products as a share of the machine's best rate.

    Attention is left out. Of ours the head counts only for target tokens. The others multiply the
    whole head for each token.
    """
    flops = raw.get("flops", {"token": 6 * peak["multiplied_parameters"], "target": 0})
    return (
        flops["token"] * raw["tokens_per_second"] + flops["target"] * raw["targets_per_second"]
    ) / peak["flops"]


def spread(values: list[float]) -> list[float]:
    """Return the median, the least and the most."""
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


def median_and_range(values: list[float] | None, form: str) -> str:
    """Return a `spread` as text, as `1.5 [1.2, 1.9]`; a dash for None."""
    return "-" if values is None else f"{values[0]:{form}} [{values[1]:{form}}, {values[2]:{form}}]"
