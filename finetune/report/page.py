"""`report.html`: one self-contained page from the files of a run.

Floor 1. It needs no network, no script and no other file; its content security policy forbids them.
"""

from pathlib import Path

from markupsafe import Markup

from finetune.report import facts
from finetune.report.charts import charts_of
from finetune.report.pages import fill, write_page
from finetune.run.folder import RunDir
from finetune.run.metrics import METRICS
from finetune.run.records import RunRecords, read_run


def write_report(root: Path) -> Path:
    """Write report.html into the run's folder and return its path. Runs no model: a report can be written at any time.

    Raises UserError where `root` is no run, or the file cannot be written.
    """
    return write_page(render(read_run(root)), RunDir(root).report)


def render(run: RunRecords) -> str:
    """Return the page."""
    evaluated = [*(evaluation.metrics for evaluation in run.evaluations), run.test]
    samples, first, last = facts.sample_pairs(run)
    environment = run.environment
    return fill(
        "report.html.jinja",
        styles=("report.css",),
        run=run,
        verdict=facts.verdict(run),
        state=facts.state(run),
        duration=facts.duration(run),
        subtitle=_subtitle(run),
        changes=facts.changes(run),
        charts=[(chart, Markup(chart.svg)) for chart in charts_of(run)],
        samples=samples,
        first_step=first,
        last_step=last,
        metrics=[
            metric
            for metric in METRICS
            if any(metric.value(figures) is not None for figures in evaluated)
        ],
        signatures=_signatures(run),
        data_columns=facts.counts(run.data.as_dict())[0],
        data_rows=facts.counts(run.data.as_dict())[1],
        data_facts=facts.pairs(run.data.as_dict()),
        model_facts=facts.pairs(environment.model),
        versions=environment.versions,
        machine_facts=facts.pairs(environment.machine) + _run_facts(run),
        command=environment.command,
    )


def _subtitle(run: RunRecords) -> list[str]:
    """What stands under the title: model, kind of data, date."""
    model = run.environment.model
    named = model.get("architecture", "")
    if size := model.get("parameters", 0):
        named += f", {size / 1e6:,.1f} M parameters" if size >= 1e6 else f", {size:,} parameters"
    parts = [named, run.data.format, run.environment.started[:10]]
    return [part for part in parts if part]


def _run_facts(run: RunRecords) -> list[tuple[str, str]]:
    keys = ("device", "precision", "processes", "started")
    known = run.environment.as_dict()
    return facts.pairs({key: known[key] for key in keys if known.get(key)})


def _signatures(run: RunRecords) -> list[tuple[str, str]]:
    """sacrebleu's signatures of the last evaluation that has any."""
    known = [
        [
            (metric.name, evaluation.metrics[f"{metric.key}_signature"])
            for metric in METRICS
            if f"{metric.key}_signature" in evaluation.metrics
        ]
        for evaluation in run.evaluations
    ]
    return next((found for found in reversed(known) if found), [])
