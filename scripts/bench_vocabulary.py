"""What the modes of the vocabulary cost and what becomes of the model, beside a bare PyTorch loop and TRL's SFTTrainer.

    python scripts/bench_vocabulary.py --model DIR [--trl DIR] [--unrelated FILE] [--steps 200 --seeds 0,1,2 --lrs 1e-4,3e-4]

--model is a Hugging Face folder (SmolLM2-135M, Gemma-3-270M; take Gemma's weights in bfloat16, as its makers publish them:
`from_pretrained(DIR, dtype=torch.bfloat16).save_pretrained(...)` of a converted GGUF); --trl is where `pip install --no-deps
--target DIR trl==1.16.0` put TRL. See contestants.py for who is compared and how. All contestants take their turn for one seed and
learning rate, then for the next; each trains on the same number of tokens, and its model is then read over the full vocabulary:
held-out loss, inside and outside of the tokens that the training data has, probability that goes to inactive tokens (mean and 99th
percentile) and their share in answers, loss on unrelated text, largest movement of an inactive row.

Speed is the median over all steps but the first two; the spread is over rounds. "head" and "optimizer" are their shares of our
steps; "of peak" is as in bench_train.py, "state" the GB of weights, gradients and optimizer state. Prints a table for each learning
rate, then one JSON line.
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
    check_arguments,
    in_process,
    median_rate,
    share_of_peak,
    spread,
)

WARMUP = 2
READ = (
    "held_out_loss", "loss_inside", "loss_outside", "share_outside", "inactive_mass", "inactive_mass_p99", "generated_outside",
    "unrelated_loss", "inactive_rows_moved",
)  # fmt: skip


def measure(args: argparse.Namespace, lr: float) -> dict[str, list[dict[str, Any]]]:
    """For every contestant one result a seed."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contestants}
    peak = in_process(args, "peak", args.rows, args.length)
    for seed in args.seeds:
        for name in args.contestants:
            raw = in_process(args, name, args.rows, args.length, seed=seed, lr=lr)
            if "seconds" in raw:
                for what in ("tokens", "targets"):
                    raw[f"{what}_per_second"] = median_rate(raw, what, WARMUP)
                raw["share_of_matmul_peak"] = share_of_peak(raw, peak)
                speed = f"{raw['tokens_per_second']:.1f} tokens/s, {raw['peak_memory_bytes'] / 1e9:.2f} GB, "
            else:
                speed = ""
            found[name].append(raw)
            read = f"held-out loss {raw['held_out_loss']:.4f}, inactive mass {raw['inactive_mass']:.2%}"
            print(
                f"  lr {lr:g}, seed {seed}: {name} {speed}{read} (load {os.getloadavg()[0]:.1f})",
                flush=True,
            )
    return found


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians [least, most] over seeds, of each contestant and of the ratios to the bare loop and to the best of TRL."""
    rows: dict[str, Any] = {}
    for name, results in found.items():
        rows[name] = {
            key: spread([result[key] for result in results])
            for key in READ
            if all(key in r for r in results)
        }
        if "tokens_per_second" in results[0]:
            for key in ("tokens_per_second", "targets_per_second"):
                rows[name][key] = spread([result[key] for result in results])
            rows[name]["share_of_matmul_peak"] = spread(
                [result["share_of_matmul_peak"] for result in results]
            )
            rows[name]["training_state_gb"] = spread(
                [result["training_state_bytes"] / 1e9 for result in results]
            )
            rows[name]["peak_memory_gb"] = spread(
                [result["peak_memory_bytes"] / 1e9 for result in results]
            )
            rows[name]["tokens_trained"] = results[0]["tokens_trained"]
            rows[name]["phases"] = {
                phase: spread(
                    [result["phases"][phase] / sum(result["seconds"]) for result in results]
                )
                for phase in results[0]["phases"]
            }
    return {"contestants": rows, "ratios": _ratios(found)}


def _ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    trl = [name for name in found if name in TRL_MODES]
    rivals = [name for name in ("bare", "finetune:full") if name in found]
    if trl:
        rivals.append(
            max(
                trl, key=lambda name: statistics.median(r["tokens_per_second"] for r in found[name])
            )
        )
    ratios: dict[str, dict[str, list[float]]] = {}
    for name in found:
        for rival in rivals:
            if name.startswith("finetune") and name != rival:
                pairs = list(zip(found[name], found[rival], strict=True))
                ratios[f"{name} over {rival}"] = {
                    "tokens_per_second": spread(
                        [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
                    ),
                    "peak_memory": spread(
                        [a["peak_memory_bytes"] / b["peak_memory_bytes"] for a, b in pairs]
                    ),
                    "held_out_loss": spread(
                        [a["held_out_loss"] / b["held_out_loss"] for a, b in pairs]
                    ),
                }
    return ratios


def print_table(args: argparse.Namespace, lr: float, summary: dict[str, Any]) -> None:
    print(
        f"\n{args.model.name}: {args.rows} x {args.length}, {args.steps} steps, lr {lr:g}, seeds {args.seeds}; median [least, most]"
    )
    speed, read = (
        ("tokens/s", "targets/s", "of peak", "GB", "state", "head", "optim"),
        ("held-out loss", "outside", "inactive mass"),
    )
    columns = (*speed, *read, "unrelated", "moved")
    print(
        f"{'':17}"
        + "".join(f"{column:>{width}}" for column, width in zip(columns, WIDTHS, strict=True))
    )
    for name, row in summary["contestants"].items():
        phases = row.get("phases", {})
        cells = (
            _cell(row.get("tokens_per_second"), ".0f"),
            _cell(row.get("targets_per_second"), ".0f"),
            _middle(row.get("share_of_matmul_peak"), ".0%"),
            _middle(row.get("peak_memory_gb"), ".2f"),
            _middle(row.get("training_state_gb"), ".2f"),
            _middle(phases.get("head"), ".0%"),
            _middle(phases.get("optimizer"), ".0%"),
            _cell(row["held_out_loss"], ".3f"),
            _middle(row.get("loss_outside"), ".2f"),
            _middle(row["inactive_mass"], ".2%"),
            _middle(row.get("unrelated_loss"), ".3f"),
            _middle(row["inactive_rows_moved"], ".1e"),
        )
        print(
            f"{name:17}"
            + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        )
    for name, ratio in summary["ratios"].items():
        print(
            f"{name}: "
            + ", ".join(f"{what} x {_cell(values, '.3f')}" for what, values in ratio.items())
        )


WIDTHS = (16, 16, 9, 7, 7, 6, 7, 22, 9, 15, 11, 9)


def _cell(values: list[float] | None, form: str) -> str:
    return "-" if values is None else f"{values[0]:{form}} [{values[1]:{form}}, {values[2]:{form}}]"


def _middle(values: list[float] | None, form: str) -> str:
    return "-" if values is None else f"{values[0]:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--seeds", default="0", help="one round for each")
    parser.add_argument("--lrs", default="1e-4")
    parser.add_argument("--contestants", help="default: all; TRL's with --trl")
    args = parser.parse_args()
    ours = ["untrained", *(f"finetune:{mode}" for mode in MODES if mode != "auto"), "bare"]
    args.contestants = (
        args.contestants.split(",")
        if args.contestants
        else [*ours, *(TRL_MODES if args.trl else ())]
    )
    check_arguments(parser, args)
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    summaries = {}
    for lr in map(float, args.lrs.split(",")):
        summaries[str(lr)] = summarise(measure(args, lr))
        print_table(args, lr, summaries[str(lr)])
    print(
        json.dumps(
            {"model": args.model.name, "steps": args.steps, "seeds": args.seeds, "lrs": summaries}
        )
    )


if __name__ == "__main__":
    main()
