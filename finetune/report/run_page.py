"""`report.html`: one self-contained page made from the files of a run.

It needs no network, no script and no other file. Its content security policy forbids them.
"""

from pathlib import Path

from markupsafe import Markup

from finetune.report import run_facts
from finetune.report.html import fill_template, write_page
from finetune.report.run_charts import charts_of
from finetune.run.folder import RunDir
from finetune.run.metrics import METRICS
from finetune.run.records import RunRecords, read_run


def write_report(root: Path) -> Path:
    """Write report.html into the run's folder and return its path.

    No model is run, so a report can be written at any time.
    Raises UserError if `root` is not a run, or if the file cannot be written.
    """
    return write_page(_render(read_run(root)), RunDir(root).report)


def _render(run: RunRecords) -> str:
    evaluated = [*(evaluation.metrics for evaluation in run.evaluations), run.test]
    samples, first, last = run_facts.sample_pairs(run)
    environment, data = run.environment, run.data.as_dict()
    data_columns, data_lines = run_facts.counts(data)
    return fill_template(
        "report.html.jinja",
        styles=("report.css",),
        run=run,
        verdict=run_facts.verdict(run),
        state=run_facts.run_state(run),
        duration=run_facts.duration(run),
        subtitle=_subtitle(run),
        changes=run_facts.metric_changes(run),
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
        data_columns=data_columns,
        data_lines=data_lines,
        data_facts=run_facts.pairs(data) + run_facts.token_counts(run),
        model_facts=run_facts.pairs(environment.model),
        versions=environment.versions,
        machine_facts=run_facts.pairs(environment.machine) + _machine_of(run),
        command=environment.command,
    )


def _subtitle(run: RunRecords) -> list[str]:
    """Return the parts of the line under the title: model, kind of data, date."""
    model = run.environment.model
    named = model.get("architecture", "")
    if number := model.get("parameters", 0):
        named += f", {run_facts.parameter_count(number)}"
    parts = [named, run.data.format, run.environment.started[:10]]
    return [part for part in parts if part]


def _machine_of(run: RunRecords) -> list[tuple[str, str]]:
    keys = ("device", "precision", "processes", "started")
    known = run.environment.as_dict()
    return run_facts.pairs({key: known[key] for key in keys if known.get(key)})


def _signatures(run: RunRecords) -> list[tuple[str, str]]:
    """Return sacrebleu's signatures from the last evaluation that has any."""
    known = [
        [
            (metric.name, evaluation.metrics[f"{metric.key}_signature"])
            for metric in METRICS
            if f"{metric.key}_signature" in evaluation.metrics
        ]
        for evaluation in run.evaluations
    ]
    return next((found for found in reversed(known) if found), [])
