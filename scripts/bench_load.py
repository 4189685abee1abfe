"""Large data and long runs: seconds of CPU, peak memory, and what grows with the steps.

    python scripts/bench_load.py [--records 300000] [--steps 2000] [--logged 100000]

A file of conversations is written and read in several ways, a tiny run takes many steps, and a
report is made of many logged steps. Each command is a process of its own. The last line is JSON.
Memory in MB: the peak is the kernel's (ru_maxrss); `early` and `late` are what the process held at
30 % and at 95 % of its time.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
WORDS = ("sun", "moon", "tree", "river", "stone", "bird", "cloud", "house", "road", "light")


def conversation(chance: random.Random) -> dict[str, Any]:
    """Return a question of 5 to 25 words, and an answer of 5 to 40."""

    def text(least: int, most: int) -> str:
        words = range(chance.randint(least, most))
        return " ".join(f"{chance.choice(WORDS)}{chance.randint(0, 99)}" for _ in words)

    turns = (("user", text(5, 25)), ("assistant", text(5, 40)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def measured(arguments: list[str], folder: Path) -> dict[str, float]:
    """Run `finetune ARGUMENTS` and return its seconds, its CPU seconds and its memory."""
    began, held = time.monotonic(), []
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", *arguments], cwd=folder, stdout=log, stderr=log
        )
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            held.append((time.monotonic() - began, resident(process.pid)))
            time.sleep(0.2)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (folder / "log.txt").read_text()[-2000:]
    seconds = time.monotonic() - began
    at = {
        share: next((mb for when, mb in held if when > share * seconds), 0) for share in (0.3, 0.95)
    }
    return {
        "seconds": round(seconds, 1),
        "cpu": round(usage.ru_utime + usage.ru_stime, 1),
        "peak": round(usage.ru_maxrss / 1024),
        "early": at[0.3],
        "late": at[0.95],
    }


def resident(pid: int) -> int:
    """Return the memory of a process in MB, 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return 0


def write_config(folder: Path) -> None:
    """Write c.yaml, chat.jsonl with 400 conversations and held.jsonl with 20."""
    chance = random.Random(1)
    for name, count in (("chat", 400), ("held", 20)):
        lines = (json.dumps(conversation(chance)) + "\n" for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    tree = {
        "model": {"config": LLAMA, "tokenizer": {"vocab_size": 300}},
        "data": {"train": "chat.jsonl", "validation": "held.jsonl", "max_length": 256},
        "training": {"max_steps": 1, "batch_size": 4, "precision": "fp32"},
        "evaluation": {"samples": 1, "generate": 0, "before": False},
        "generation": {"max_new_tokens": 4},
        "vocabulary": {"mode": "full"},
    }
    (folder / "c.yaml").write_text(json.dumps(tree))


def large_data(folder: Path, records: int) -> dict[str, dict[str, float]]:
    """Measure the ways in which a file of many conversations is read."""
    chance = random.Random(2)
    with (folder / "large.jsonl").open("w") as file:
        for _ in range(records):
            file.write(json.dumps(conversation(chance)) + "\n")
    large = ["data.train=large.jsonl"]
    stream = [*large, "data.streaming=true", "training.batch_size=16", "output_dir=stream"]
    train = ["train", "c.yaml", *large]
    return {
        "nothing: 400 records": measured(["train", "c.yaml", "--dry-run"], folder),
        "encoded for the first time": measured([*train, "--dry-run"], folder),
        "encoded again": measured([*train, "--dry-run"], folder),
        "inspected": measured(["inspect", "c.yaml", *large], folder),
        "streamed, 5 steps": measured(["train", "c.yaml", *stream, "training.max_steps=5"], folder),
        "streamed, 600 steps": measured(
            ["train", "c.yaml", *stream, "training.max_steps=600", "overwrite_output_dir=true"],
            folder,
        ),
    }


def long_run(folder: Path, steps: int) -> dict[str, Any]:
    """Train for many steps, and return the figures with what the folder holds."""
    sizes = {}
    for count in (steps // 10, steps):
        run = f"steps-{count}"
        every = [f"evaluation.every={count // 10}", "checkpoint.keep=2", f"output_dir={run}"]
        found = measured(["train", "c.yaml", f"training.max_steps={count}", *every], folder)
        files = [path for path in (folder / run).rglob("*") if path.is_file()]
        sizes[count] = {path.name: path.stat().st_size for path in files}
    small, large = sizes.values()
    grown = sorted(name for name in large if large[name] > 1.5 * small.get(name, 0))
    return {**found, "grew with the steps": grown, "metrics": large["metrics.jsonl"] // 1000}


def long_report(folder: Path, run: Path, steps: int) -> dict[str, float]:
    """Make the report of a run with many logged steps."""
    chance = random.Random(3)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = 5 - 3 * step / steps + chance.random()
            line = {"step": step, "epoch": step / 1000, "loss": loss, "lr": 1e-3, "grad_norm": 1.0}
            line |= {"num_target_tokens": 100, "num_tokens": 200, "tokens_per_second": 1000.0}
            file.write(json.dumps({**line, "seconds": 0.1}) + "\n")
            if step % max(1, steps // 200) == 0:
                figures = {"loss": loss, "perplexity": 10.0, "seconds": 1.0}
                file.write(json.dumps({"step": step, "evaluation": figures}) + "\n")
    page = run / "report.html"
    return {**measured(["report", str(run)], folder), "page": page.stat().st_size // 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--logged", type=int, default=100_000)
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update(FINETUNE_CACHE=f"{name}/cache", HF_DATASETS_CACHE=f"{name}/datasets")
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        write_config(folder)
        figures |= large_data(folder, options.records)
        figures[f"{options.steps:,} steps"] = long_run(folder, options.steps)
        for steps in (options.logged // 100, options.logged):
            run = folder / f"steps-{options.steps}"
            figures[f"report of {steps:,} steps"] = long_report(folder, run, steps)
    for what, found in figures.items():
        print(f"{what:30}" + "".join(f"  {key} {value}" for key, value in found.items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
