"""`report.html`: one self-contained page made from the files of a run.

It needs no network, no script and no other file. Its content security policy forbids them.
"""

from os import PathLike
from pathlib import Path

from markupsafe import Markup

from finetune.report import run_facts
from finetune.report.html import fill_template, write_page
from finetune.report.run_charts import charts_of
from finetune.run.folder import RunDir, as_path
from finetune.run.metrics import METRICS
from finetune.run.records import RunRecords, read_run


def write_report(root: str | PathLike[str], *, live: bool = False) -> Path:
    """Write report.html into the run's folder and return its path.

    No model is run, so a report can be written at any time. A `live` one is of a run that goes on:
    the page loads itself again every half minute.
    Raises UserError if `root` is not a run, or if the file cannot be written.
    """
    root = as_path(root, "a run's folder")
    return write_page(_render(read_run(root), live), RunDir(root).report)


def _render(run: RunRecords, live: bool) -> str:
    samples, first, last = run_facts.sample_pairs(run)
    environment, data = run.environment, run.data.as_dict()
    data_columns, data_lines = run_facts.counts(data)
    return fill_template(
        "report.html.jinja",
        styles=("report.css",),
        run=run,
        live=live,
        verdict=run_facts.verdict(run),
        state=run_facts.run_state(run, live=live),
        phases=run_facts.phases(run),
        subtitle=_subtitle(run),
        changes=run_facts.metric_changes(run),
        charts=[(chart, Markup(chart.svg)) for chart in charts_of(run)],
        samples=samples,
        first_step=first,
        last_step=last,
        metrics=run_facts.evaluation_columns(run),
        evaluation_parts=run_facts.evaluation_parts(run),
        vocabulary=run_facts.vocabulary_lines(run),
        signatures=_signatures(run),
        data_columns=data_columns,
        data_lines=data_lines,
        data_facts=run_facts.pairs(data) + run_facts.token_counts(run),
        model_facts=run_facts.pairs({**environment.model, **environment.training}),
        versions=environment.versions,
        machine_facts=run_facts.pairs(environment.machine) + _machine_of(run),
        command=environment.command,
        settings=run_facts.settings(run),
    )


def _subtitle(run: RunRecords) -> list[str]:
    """Return the parts of the line under the title: model, method, kind of data, time, date."""
    model, training = run.environment.model, run.environment.training
    named = str(model.get("name") or model.get("architecture", ""))
    if number := model.get("parameters", 0):
        named += f", {run_facts.parameter_count(number)}"
    how = " with ".join(str(training[key]) for key in ("method", "optimizer") if key in training)
    started = run_facts.date_of(run.environment.started)
    parts = [named, how, run.data.format, run_facts.duration(run), started]
    return [part for part in parts if part]


def _machine_of(run: RunRecords) -> list[tuple[str, str]]:
    keys = ("device", "precision", "processes")
    known = run.environment.as_dict()
    facts = run_facts.pairs({key: known[key] for key in keys if known.get(key)})
    started = run_facts.date_of(run.environment.started)
    return [*facts, *([("Started", started)] if started else [])]


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
