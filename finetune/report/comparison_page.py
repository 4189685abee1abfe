"""`comparison.html`: one self-contained page from comparison.json.

Floor 1. As the report of a run it needs no network, no script and no other file.
"""

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finetune.errors import UserError
from finetune.report import comparison_facts as compared
from finetune.report import run_facts
from finetune.report.comparison_charts import legend, pictures_of
from finetune.report.html import fill, write_page

Record = dict[str, Any]


def write_comparison(root: Path) -> Path:
    """Write comparison.html into the comparison's folder and return its path. Runs no model.

    Raises UserError where there is no comparison.json, or the page cannot be written.
    """
    source, target = root / "comparison.json", root / "comparison.html"
    if not source.is_file():
        raise UserError(
            f"{root} holds no finished comparison: there is no {source}; run `finetune compare` to its end"
        )
    return write_page(render(json.loads(source.read_text(encoding="utf-8"))), target)


def render(comparison: Record) -> str:
    """Return the page."""
    environment = comparison["environment"]
    return fill(
        "comparison.html.jinja",
        styles=("report.css", "comparison.css"),
        comparison=comparison,
        subtitle=compared.subtitle(comparison),
        state=compared.state(comparison),
        legend=Markup(legend(list(comparison["optimizers"]))),
        pictures=[(picture, Markup(picture.svg)) for picture in pictures_of(comparison)],
        rows=[compared.line(name, row) for name, row in compared.ranked(comparison)],
        rules=compared.rules(comparison),
        caveats=compared.caveats(comparison),
        bins=compared.bins(comparison),
        runs=[compared.run_line(run) for run in comparison["runs"]],
        machine_facts=run_facts.pairs(environment["machine"])
        + run_facts.pairs({key: environment[key] for key in ("device", "precision")}),
        model_facts=run_facts.pairs(comparison["model"]),
    )
