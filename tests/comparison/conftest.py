"""Runs and a comparison made by hand."""

import json

from finetune.comparison.summary import summarise
from finetune.run.files import finite
from finetune.run.trials import Point, Result, Run

BINS = {
    "head": {"tokens": 20, "targets": 500},
    "body": {"tokens": 200, "targets": 400},
    "tail": {"tokens": 800, "targets": 100},
}


def made_run(name, seed, lr, losses, *, reported=False, problem="", state=1000):
    """A run evaluated every ten steps, each of ten tokens and a tenth of a second."""
    points = [Point(10 * i, loss, 1000 * i, 1.0 * i) for i, loss in enumerate(losses)]
    test = (
        {
            "all": losses[-1] + 0.1,
            "head": losses[-1] / 2,
            "body": losses[-1],
            "tail": losses[-1] * 2,
        }
        if reported
        else None
    )
    result = Result(
        optimizer=name,
        phase="reported" if reported else "tuning",
        seed=seed,
        settings={"lr": lr, "weight_decay": 0.01, "betas": [0.9, 0.999], "amsgrad": False},
        problem=problem,
        start={"the model": f"m{seed}", "the training data": "d"},
        state_bytes=state,
        test=None if problem else test,
        bins=BINS if reported and not problem else None,
    )
    steps = points[-1].step
    return Run(
        "folder", result, points, [(step, 0.01 / (1 + step)) for step in range(1, steps, 2)], steps
    )


def made_comparison(names=("sgd", "adam", "adamw"), *, seeds=3, diverged=()):
    """Return what comparison.json would hold.

    Losses fall further for every further name. Those in `diverged` lose a seed.
    """
    tuning, reported = {}, {}
    for rank, name in enumerate(names):
        ends = [5.0 - 0.4 * rank + 0.3 * abs(i - 2) for i in range(5)]
        lrs = [10.0 ** (-4 + i / 2 + (2 if name == "sgd" else 0)) for i in range(5)]
        tuning[name] = [made_run(name, 0, lr, [6.0, 5.5, end]) for lr, end in zip(lrs, ends)]
        tuning[name][-1] = made_run(name, 0, lrs[-1], [6.0], problem="the loss is nan")
        reported[name] = [
            made_run(
                name,
                seed,
                lrs[2],
                [6.0, 5.4, 5.2, 5.0 - 0.4 * rank + 0.02 * seed * (rank + 1)],
                reported=True,
                state=4_000_000 * rank,
            )
            for seed in range(1, seeds + 1)
        ]
        if name in diverged:
            reported[name][-1] = made_run(
                name, seeds, lrs[2], [6.0, 5.4], reported=True, problem="the loss is nan"
            )
    protocol = {
        "steps": 30,
        "batch_size": 8,
        "tuning_seed": 0,
        "seeds": list(range(1, seeds + 1)),
        "trials": 5,
        "max_widenings": 4,
        "evaluate_every": 10,
        "data_rule": "the held-out records choose, and data.test is the test data",
        "schedule": "linear",
        "max_grad_norm": 1.0,
        "divergence_threshold": 4.0,
        "precision": "fp32",
    }
    environment = {
        "command": "finetune compare c.yaml 'optimizer.name=[sgd,adam,adamw]'",
        "started": "2026-03-14T09:26:53+00:00",
        "device": "cpu",
        "precision": "fp32",
        "machine": {
            "system": "Linux x86_64",
            "processor": "A <processor>",
            "cores": 2,
            "memory_gib": 15.6,
            "accelerator": None,
        },
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
    }
    record = {
        "name": "compare-tiny",
        **summarise(tuning, reported, grid_size=5),
        "protocol": protocol,
        "notes": ["betas is given to adam and adamw alone: sgd does not take it."],
        "model": {"architecture": "LlamaForCausalLM", "parameters": 214_000, "tied": True},
        "environment": environment,
        "config": "seed: 0\n",
    }
    return json.loads(json.dumps(finite(record)))


def write_folder(parent, **options):
    """The folder of such a comparison."""
    folder = parent / "compare-tiny"
    folder.mkdir()
    (folder / "comparison.json").write_text(
        json.dumps(made_comparison(**options)), encoding="utf-8"
    )
    return folder
