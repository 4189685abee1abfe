"""What the modes of the vocabulary cost, and what they do to the model.

    python scripts/bench_vocabulary.py --model DIR [--trl DIR] [--unrelated FILE]
                                       [--steps 200 --seeds 0,1,2 --lrs 1e-4,3e-4]

The rivals are a bare PyTorch loop and TRL's SFTTrainer. --model is a Hugging Face folder, such as
SmolLM2-135M or Gemma-3-270M. Take Gemma's weights in bfloat16, as its makers publish them:
`from_pretrained(DIR, dtype=torch.bfloat16).save_pretrained(...)` of a converted GGUF. --trl is the
folder into which `pip install --no-deps --target DIR trl==1.16.0` put TRL.

contestants.py says who is compared and how. For each seed and learning rate all contestants take
their turn, and train on the same number of tokens. Then each model is evaluated over the full
vocabulary: held-out loss, also inside and outside of the tokens of the training data; probability
of inactive tokens (mean and 99th percentile) and their share in answers; loss on unrelated text, as
many records as are held out; largest movement of an inactive row.

Speed is the median over all steps but the first two, and the spread is over rounds. "head" and
"optimizer" are their shares of our steps. "of peak" is as in bench_train.py. "state" is the GB of
weights, gradients and optimizer state. Prints a table for each learning rate, then one JSON line.
"""

import argparse
import json
import os
import statistics
from typing import Any

from harness import (
    MODES,
    TRL_MODES,
    add_arguments,
    add_shape,
    check_arguments,
    in_process,
    median_and_range,
    median_rate,
    share_of_peak,
    spread,
)

WARMUP_STEPS = 2
EVALUATED = (  # keys of evaluate_model
    "held_out_loss", "loss_inside", "loss_outside", "share_outside", "inactive_mass",
    "inactive_mass_p99", "generated_outside", "unrelated_loss", "inactive_rows_moved",
)  # fmt: skip
COLUMNS = {  # heading -> width
    "tokens/s": 16,
    "targets/s": 16,
    "of peak": 9,
    "GB": 7,
    "state": 7,
    "head": 6,
    "optim": 7,
    "held-out loss": 22,
    "outside": 9,
    "inactive mass": 15,
    "unrelated": 11,
    "moved": 9,
}


def measure(args: argparse.Namespace, lr: float) -> dict[str, list[dict[str, Any]]]:
    """Return for every contestant one result a seed."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contestants}
    peak = in_process(args, "peak", args.sequences, args.length)
    for seed in args.seeds:
        for name in args.contestants:
            raw = in_process(args, name, args.sequences, args.length, seed=seed, lr=lr)
            speed = ""
            if "seconds" in raw:
                for what in ("tokens", "targets"):
                    raw[f"{what}_per_second"] = median_rate(raw, what, WARMUP_STEPS)
                raw["share_of_matmul_peak"] = share_of_peak(raw, peak)
                memory = raw["peak_memory_bytes"] / 1e9
                speed = f"{raw['tokens_per_second']:.1f} tokens/s, {memory:.2f} GB, "
            found[name].append(raw)
            print(
                f"  lr {lr:g}, seed {seed}: {name} {speed}held-out loss "
                f"{raw['held_out_loss']:.4f}, inactive mass {raw['inactive_mass']:.2%} "
                f"(load {os.getloadavg()[0]:.1f})",
                flush=True,
            )
    return found


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians [least, most] over seeds: of each contestant, and of its ratios to rivals.

    The rivals are the bare loop, our own full vocabulary, and the best of TRL.
    """
    contestants = {name: _summary(results) for name, results in found.items()}
    return {"contestants": contestants, "ratios": _ratios(found)}


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    def over_seeds(key: str, unit: float = 1.0) -> list[float]:
        return spread([result[key] / unit for result in results])

    summary: dict[str, Any] = {
        key: over_seeds(key) for key in EVALUATED if all(key in result for result in results)
    }
    if "tokens_per_second" not in results[0]:
        return summary
    for key in ("tokens_per_second", "targets_per_second", "share_of_matmul_peak"):
        summary[key] = over_seeds(key)
    summary["training_state_gb"] = over_seeds("training_state_bytes", 1e9)
    summary["peak_memory_gb"] = over_seeds("peak_memory_bytes", 1e9)
    summary["tokens_trained"] = results[0]["tokens_trained"]
    summary["phases"] = {
        phase: spread([result["phases"][phase] / sum(result["seconds"]) for result in results])
        for phase in results[0]["phases"]
    }
    return summary


def _ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    def speed(name: str) -> float:
        return statistics.median(result["tokens_per_second"] for result in found[name])

    rivals = [name for name in ("bare", "finetune:full") if name in found]
    if trl := [name for name in found if name in TRL_MODES]:
        rivals.append(max(trl, key=speed))
    keys = {"tokens_per_second": "tokens_per_second", "peak_memory": "peak_memory_bytes"}
    return {
        f"{name} over {rival}": {
            what: spread([a[key] / b[key] for a, b in zip(found[name], found[rival], strict=True)])
            for what, key in (keys | {"held_out_loss": "held_out_loss"}).items()
        }
        for name in found
        for rival in rivals
        if name.startswith("finetune") and name != rival
    }


def print_table(args: argparse.Namespace, lr: float, summary: dict[str, Any]) -> None:
    """Print one learning rate: a line for each contestant, then the ratios."""
    print(
        f"\n{args.model.name}: {args.sequences} x {args.length}, {args.steps} steps, lr {lr:g}, "
        f"seeds {args.seeds}; median [least, most]"
    )
    print(f"{'':17}" + "".join(f"{column:>{width}}" for column, width in COLUMNS.items()))
    for name, found in summary["contestants"].items():
        phases = found.get("phases", {})
        cells = (
            median_and_range(found.get("tokens_per_second"), ".0f"),
            median_and_range(found.get("targets_per_second"), ".0f"),
            _median(found.get("share_of_matmul_peak"), ".0%"),
            _median(found.get("peak_memory_gb"), ".2f"),
            _median(found.get("training_state_gb"), ".2f"),
            _median(phases.get("head"), ".0%"),
            _median(phases.get("optimizer"), ".0%"),
            median_and_range(found["held_out_loss"], ".3f"),
            _median(found.get("loss_outside"), ".2f"),
            _median(found["inactive_mass"], ".2%"),
            _median(found.get("unrelated_loss"), ".3f"),
            _median(found["inactive_rows_moved"], ".1e"),
        )
        widths = zip(cells, COLUMNS.values(), strict=True)
        print(f"{name:17}" + "".join(f"{cell:>{width}}" for cell, width in widths))
    for name, ratio in summary["ratios"].items():
        parts = (f"{what} x {median_and_range(values, '.3f')}" for what, values in ratio.items())
        print(f"{name}: {', '.join(parts)}")


def _median(values: list[float] | None, form: str) -> str:
    return "-" if values is None else f"{values[0]:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    add_shape(parser, length=256)
    parser.add_argument("--seeds", default="0", help="one round for each")
    parser.add_argument("--lrs", default="1e-4")
    parser.add_argument("--contestants", help="default: all; TRL's with --trl")
    args = parser.parse_args()
    ours = ["untrained", *(f"finetune:{mode}" for mode in MODES if mode != "auto"), "bare"]
    everyone = [*ours, *(TRL_MODES if args.trl else ())]
    args.contestants = args.contestants.split(",") if args.contestants else everyone
    check_arguments(parser, args)
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    summaries = {}
    for lr in map(float, args.lrs.split(",")):
        summaries[str(lr)] = summarise(measure(args, lr))
        print_table(args, lr, summaries[str(lr)])
    settings = {"model": args.model.name, "steps": args.steps, "seeds": args.seeds}
    print(json.dumps({**settings, "lrs": summaries}))


if __name__ == "__main__":
    main()
