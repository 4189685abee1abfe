"""Speed of a whole training step: this project, a bare PyTorch loop, and TRL's SFTTrainer.

    python scripts/bench_train.py --model DIR [--trl DIR]       rounds at 4 x 256 and 4 x 512
    python scripts/bench_train.py --model DIR --quick           a short look at 4 x 256

--model is a Hugging Face folder. --trl is the folder into which
`pip install --no-deps --target DIR trl==1.16.0` put TRL, which is no dependency.
contestants.py says who is compared and how. All take their turn in each round. Ratios are taken
within a round, and the spread is over rounds.

Share of the matmul peak: 6 x (parameters that are multiplied) x tokens / seconds, over the measured
rate of the model's MLP product. The head is multiplied, the look-up is not. Attention is left out.
Of ours, so is what it does not compute: the head of tokens that are no targets, and the gradient of
rows that do not train. Prints a table for each shape, then one JSON line.
"""

import argparse
import json
import os
import statistics
from typing import Any

from harness import (
    TRL_MODES,
    add_arguments,
    check_arguments,
    in_process,
    median_and_range,
    median_rate,
    share_of_peak,
    spread,
)

SHAPES = "4x256,4x512"


def measure(args: argparse.Namespace, sequences: int, length: int) -> dict[str, Any]:
    """Return all rounds at one shape: for every contestant a list with one result a round."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contestants}
    peaks = []
    for number in range(args.rounds):
        peaks.append(in_process(args, "peak", sequences, length))
        for name in args.contestants:
            raw = in_process(args, name, sequences, length)
            raw["tokens_per_second"] = median_rate(raw, "tokens", args.warmup)
            raw["targets_per_second"] = median_rate(raw, "targets", args.warmup)
            rounds[name].append(raw)
            print(
                f"  round {number + 1}, {sequences} x {length}: {name} "
                f"{raw['tokens_per_second']:.1f} tokens/s (load {os.getloadavg()[0]:.1f})",
                flush=True,
            )
    return {
        "sequences": sequences,
        "length": length,
        "peak": max(peaks, key=lambda peak: peak["flops"]),
        "rounds": rounds,
    }


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Return medians over rounds, [least, most], and the ratios of rounds."""
    rounds, peak = measured["rounds"], measured["peak"]
    trl = [name for name in rounds if name.startswith("trl")]
    speed = {name: [r["tokens_per_second"] for r in results] for name, results in rounds.items()}
    rivals = {name: speed[name] for name in ("bare",) if name in speed}
    if trl:
        best = max(trl, key=lambda name: statistics.median(speed[name]))
        rivals[f"the best of TRL ({best})"] = speed[best]
    contestants = {}
    for name, results in rounds.items():
        contestants[name] = {
            "tokens_per_second": spread(speed[name]),
            "targets_per_second": spread([r["targets_per_second"] for r in results]),
            "peak_memory_gb": spread([r["peak_memory_bytes"] / 1e9 for r in results]),
            "share_of_matmul_peak": spread([share_of_peak(r, peak) for r in results]),
            "held_out_loss": results[-1]["held_out_loss"],
            "tokens_trained": results[-1]["tokens_trained"],
        }
    ratios = {}
    if "finetune" in speed:
        ratios = {
            name: spread([a / b for a, b in zip(speed["finetune"], theirs, strict=True)])
            for name, theirs in rivals.items()
        }
    return {key: measured[key] for key in ("sequences", "length", "peak")} | {
        "contestants": contestants,
        "finetune_over": ratios,
    }


def print_table(summary: dict[str, Any], rounds: int) -> None:
    """Print one shape: a line for each contestant, then the ratios."""
    peak = summary["peak"]
    print(
        f"\n{summary['sequences']} x {summary['length']}, {rounds} rounds; median over rounds "
        f"[least, most]; matmul peak {peak['flops'] / 1e9:.0f} GFLOP/s ({peak['dtype']})"
    )
    print(
        f"{'':12} {'tokens/s':>20} {'targets/s':>20} {'memory GB':>10} {'of peak':>8} "
        f"{'held-out loss':>14} {'tokens':>8}"
    )
    for name, found in summary["contestants"].items():
        print(
            f"{name:12} {median_and_range(found['tokens_per_second'], '.0f'):>20} "
            f"{median_and_range(found['targets_per_second'], '.0f'):>20} "
            f"{found['peak_memory_gb'][2]:10.2f} {found['share_of_matmul_peak'][0]:8.0%} "
            f"{found['held_out_loss']:14.3f} {found['tokens_trained']:8}"
        )
    for name, (middle, least, most) in summary["finetune_over"].items():
        print(f"finetune is {middle:.2f} times as fast as {name} [{least:.2f}, {most:.2f}]")


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--shapes", default=SHAPES, help="SEQUENCESxLENGTH,...")
    parser.add_argument(
        "--warmup", type=int, default=2, help="steps that are not timed, at least 1"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--contestants", help=f"of finetune, bare, {', '.join(TRL_MODES)}; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="4 x 256 only, 3 steps, 1 round")
    args = parser.parse_args()
    ours = ["finetune", "bare", *(TRL_MODES if args.trl else ())]
    args.contestants = args.contestants.split(",") if args.contestants else ours
    check_arguments(parser, args)
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    if args.quick:
        args.shapes, args.steps, args.rounds = args.shapes[:1], 3, 1
        args.held_out, args.warmup = 8, 1
    return args


def main() -> None:
    args = parse()
    summaries = []
    for sequences, length in args.shapes:
        summaries.append(summarise(measure(args, sequences, length)))
        print_table(summaries[-1], args.rounds)
    settings = {"steps": args.steps, "warmup": args.warmup, "rounds": args.rounds}
    print(json.dumps({**settings, "shapes": summaries}))


if __name__ == "__main__":
    main()
