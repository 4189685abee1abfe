"""The end of a comparison: comparison.json, comparison.csv and comparison.html in its folder."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.comparison import grids
from finetune.config import RunConfig, dump_config
from finetune.report.comparison_page import write_comparison
from finetune.run.environment import collect_environment
from finetune.run.files import write_json, write_text
from finetune.run.folder import RunDir
from finetune.run.records import Environment
from finetune.run.wording import listed


def write_outcome(
    summary: dict[str, Any],
    base: RunConfig,
    *,
    rule: str,
    trials: int,
    seeds: int,
    notes: list[str],
) -> Path:
    """Write the three files from the result of `summarise`, and return the path of the page.

    `base` is the config that the runs were made from. Its output_dir is the comparison's folder.
    `rule` is the one of `data_rule`. `notes` come before those of the runs.
    """
    root = base.output_dir
    environments = {
        name: Environment.read(RunDir(root / "runs" / name / f"seed-{base.seed + 1}"))
        for name in summary["optimizers"]
    }
    first = next(iter(environments.values()))
    protocol = {
        "steps": base.training.max_steps,
        "batch_size": base.training.batch_size,
        "tuning_seed": base.seed,
        "seeds": list(range(base.seed + 1, base.seed + 1 + seeds)),
        "trials": trials,
        "max_widenings": grids.MAX_WIDENINGS,
        "evaluate_every": base.evaluation.every,
        "data_rule": rule,
        "schedule": base.scheduler.name,
        "max_grad_norm": base.training.max_grad_norm,
        "divergence_threshold": base.training.divergence_threshold,
        "precision": first.precision,
    }
    now = collect_environment(processes=1, device=first.device, precision=first.precision).as_dict()
    record = {
        "name": root.resolve().name,
        **summary,
        "protocol": protocol,
        "notes": [*notes, *_notes(environments)],
        "model": first.model,
        "environment": {key: now[key] for key in now if key not in ("model", "notes")},
        "config": dump_config(base),
    }
    write_json(root / "comparison.json", record, indent=1)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(summary["runs"][0]))
    writer.writeheader()
    writer.writerows(summary["runs"])
    write_text(root / "comparison.csv", table.getvalue())
    return write_comparison(root)


def _notes(environments: Mapping[str, Environment]) -> list[str]:
    """Return every note of the runs once, with the optimizers that have it unless all do."""
    found = []
    for note in dict.fromkeys(note for run in environments.values() for note in run.notes):
        names = [name for name, run in environments.items() if note in run.notes]
        complete = len(names) == len(environments) or note.startswith(f"{names[0]}: ")
        found.append(note if complete else f"{listed(names)}: {note}")
    return found
