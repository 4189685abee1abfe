"""Where one training step of this project spends its time.

    python scripts/profile_step.py --model DIR [--rows 4] [--length 512] [--mode auto|full|active|sampled|frozen]

Median seconds of each part over the steps, the share of the machine's matmul peak (its best rate for the model's MLP product), the
page faults, then the operators of one more step. The data is the shipped conversations.
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
from harness import CLOCKS, MODES, add_arguments


def run_profile(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each part of our step, then the operators of one more step."""
    import torch

    import finetune.training.step as step_module

    clock = CLOCKS[args.clock]
    parts: dict[str, float] = {}
    steps: list[dict[str, float]] = []
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True
    )

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
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
            known = dict(parts) | {
                "tokens": record.num_tokens,
                "targets": record.num_target_tokens,
            }
            total = ends[-1] - ends[-2]
            known |= {"everything else": total - sum(parts.values()), "step": total}
            known |= {
                "system time": usage[-1].ru_stime - usage[-2].ru_stime,
                "page faults": usage[-1].ru_minflt - usage[-2].ru_minflt,
            }
            steps.append(known)
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
    parts, peak = profile["parts"], profile["peak"]
    total = parts["step"]
    rate = (
        profile["flops"]["token"] * parts["tokens"] + profile["flops"]["target"] * parts["targets"]
    ) / total
    counts = f"{parts['tokens']:.0f} tokens, {parts['targets']:.0f} targets"
    print(f"\none step of ours at {args.rows} x {args.length}: {total:.2f} s, {counts}")
    print(
        f"{rate / 1e9:.0f} of {peak['flops'] / 1e9:.0f} GFLOP/s ({peak['dtype']}), {rate / peak['flops']:.0%} of the peak\n"
    )
    for name, value in parts.items():
        if name not in ("tokens", "targets", "step", "system time", "page faults"):
            print(f"{name:38} {value:8.3f} s {value / total:6.1%}")
    print(
        f"{'of all that, in the kernel':38} {parts['system time']:8.3f} s, {parts['page faults']:,.0f} page faults\n"
    )
    print(f"{'operator (of one more step)':48} {'calls':>6} {'seconds':>8} {'GFLOP/s':>8}")
    for row in profile["operators"]:
        print(f"{row['name'][:48]:48} {row['calls']:6} {row['seconds']:8.3f} {row['gflops']:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
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
