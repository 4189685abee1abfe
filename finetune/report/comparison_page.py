"""`comparison.html`: one self-contained page made from comparison.json.

Like the report of a run it needs no network, no script and no other file.
"""

import json
from pathlib import Path

from markupsafe import Markup

from finetune.errors import UserError
from finetune.report import comparison_facts as facts
from finetune.report import run_facts
from finetune.report.comparison_charts import COSTS, cost_pictures, pictures_of
from finetune.report.html import fill_template, write_page


def write_comparison(root: Path) -> Path:
    """Write comparison.html into the comparison's folder and return its path. No model is run.

    Raises UserError if there is no comparison.json, or if the page cannot be written.
    """
    source, target = root / "comparison.json", root / "comparison.html"
    if not source.is_file():
        raise UserError(
            f"{root} holds no finished comparison: there is no {source}. "
            "Run `finetune compare` to its end"
        )
    return write_page(_render(json.loads(source.read_text(encoding="utf-8"))), target)


def _render(comparison: facts.JsonObject) -> str:
    environment = comparison["environment"]
    return fill_template(
        "comparison.html.jinja",
        styles=("report.css", "comparison.css"),
        comparison=comparison,
        subtitle=facts.subtitle(comparison),
        state=facts.run_counts(comparison),
        costs=[
            (key, COSTS[key], picture, Markup(picture.svg))
            for key, picture in cost_pictures(comparison)
        ],
        pictures=[(picture, Markup(picture.svg)) for picture in pictures_of(comparison)],
        spread="each seed" if facts.has_few_seeds(comparison) else "95 % interval",
        lines=[facts.optimizer_line(comparison, name) for name, _ in facts.ranked(comparison)],
        rules=facts.rules(comparison),
        caveats=facts.caveats(comparison),
        bins=facts.bins(comparison),
        runs=[facts.run_line(run) for run in comparison["runs"]],
        machine_facts=run_facts.pairs(environment["machine"])
        + run_facts.pairs({key: environment[key] for key in ("device", "precision")}),
        model_facts=run_facts.pairs(comparison["model"]),
    )
