"""Where one training step of this project spends its time.

    python scripts/profile_step.py --model DIR [--sequences 4] [--length 512]
                                   [--mode auto|full|active|sampled|frozen]

Prints the median seconds of each part over the steps, the share of the machine's matmul peak (its
best rate for the model's MLP product) and the page faults. Then the operators of one more step. The
data is the shipped conversations, unless other data is given.
"""

import argparse
import json
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contestants import run_peak
from ground import our_flops, our_trainer
from harness import CLOCKS, MODES, add_arguments, add_shape


def run_profile(args: argparse.Namespace) -> dict[str, Any]:
    """Return the median seconds of each part of our step, and the operators of one more step."""
    import torch

    import finetune.training.step as step_module

    clock = CLOCKS[args.clock]
    parts: dict[str, float] = {}
    steps: list[dict[str, float]] = []
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True
    )

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, whose seconds in the current step are added up in `parts`."""

        def call(*positional: Any, **named: Any) -> Any:
            started = clock()
            try:
                return function(*positional, **named)
            finally:
                parts[name] = parts.get(name, 0.0) + clock() - started

        return call

    ends: list[float] = []
    usage = [resource.getrusage(resource.RUSAGE_SELF)]

    def on_record(record: Any) -> None:
        ends.append(clock())
        usage.append(resource.getrusage(resource.RUSAGE_SELF))
        if len(ends) > 1:
            total = ends[-1] - ends[-2]
            others = {
                "tokens": record.num_tokens,
                "targets": record.num_target_tokens,
                "everything else": total - sum(parts.values()),
                "step": total,
                "system time": usage[-1].ru_stime - usage[-2].ru_stime,
                "page faults": usage[-1].ru_minflt - usage[-2].ru_minflt,
            }
            steps.append(parts | others)
        parts.clear()
        if len(ends) == args.steps - 1:
            profiler.__enter__()

    with our_trainer(args, on_record) as (trainer, built):
        trainer.model.forward = timed("forward (with the loss's gradient)", trainer.model.forward)
        trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
        step_module.clip_grad_norm_ = timed("clip", step_module.clip_grad_norm_)
        trainer.optimizer.step = timed("optimizer", trainer.optimizer.step)
        trainer.optimizer.zero_grad = timed("zero_grad", trainer.optimizer.zero_grad)
        source = trainer.batches
        trainer.batches = _Timed(source, timed)
        trainer.train()
        profiler.__exit__(None, None, None)
        flops = our_flops(built.model, built.language_model.sample)
    peak = run_peak(args)
    plain = steps[: args.steps - 2]
    medians = {key: statistics.median(step[key] for step in plain) for key in plain[0]}
    return {"parts": medians, "operators": _operators(profiler), "peak": peak, "flops": flops}


class _Timed:
    """Batches that take the time of each `next`."""

    def __init__(self, batches: Any, timed: Callable[..., Any]) -> None:
        self.batches, self.timed = batches, timed

    def __iter__(self) -> Iterator[Any]:
        steps = iter(self.batches)
        while True:
            yield self.timed("data", next)(steps)

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()


def _operators(profiler: Any, count: int = 22) -> list[dict[str, Any]]:
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [
        {
            "name": e.key,
            "calls": e.count,
            "seconds": e.self_cpu_time_total / 1e6,
            "gflops": e.flops / 1e3 / max(1.0, e.self_cpu_time_total),
        }
        for e in events[:count]
    ]


def print_profile(args: argparse.Namespace, profile: dict[str, Any]) -> None:
    """Print the parts of a step, and the operators of another."""
    parts, peak, flops = profile["parts"], profile["peak"], profile["flops"]
    total = parts["step"]
    rate = (flops["token"] * parts["tokens"] + flops["target"] * parts["targets"]) / total
    counts = f"{parts['tokens']:.0f} tokens, {parts['targets']:.0f} targets"
    print(f"\none step of ours at {args.sequences} x {args.length}: {total:.2f} s, {counts}")
    print(
        f"{rate / 1e9:.0f} of {peak['flops'] / 1e9:.0f} GFLOP/s ({peak['dtype']}), "
        f"{rate / peak['flops']:.0%} of the peak\n"
    )
    for name, value in parts.items():
        if name not in ("tokens", "targets", "step", "system time", "page faults"):
            print(f"{name:38} {value:8.3f} s {value / total:6.1%}")
    print(
        f"{'of this, in the kernel':38} {parts['system time']:8.3f} s, "
        f"{parts['page faults']:,.0f} page faults\n"
    )
    print(f"{'operator (of one more step)':48} {'calls':>6} {'seconds':>8} {'GFLOP/s':>8}")
    for found in profile["operators"]:
        name, rate = found["name"][:48], found["gflops"]
        print(f"{name:48} {found['calls']:6} {found['seconds']:8.3f} {rate:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    add_shape(parser, length=512)
    parser.add_argument("--mode", choices=MODES, default="auto", help="vocabulary.mode")
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    args.worker = f"finetune:{args.mode}"
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        profile = run_profile(args)
    print_profile(args, profile)
    print(json.dumps(profile))


if __name__ == "__main__":
    main()
