"""`report.html`: one self-contained page from the files of a run.

Floor 1. It needs no network, no script and no other file; its content security policy forbids them.
"""

import shlex
from pathlib import Path

from markupsafe import Markup

from finetune.report import run_facts
from finetune.report.html import fill, write_page
from finetune.report.records import RunRecords, read_run
from finetune.report.run_charts import charts_of
from finetune.run_dir import RunDir


def write_report(root: Path) -> Path:
    """Write report.html into the run's folder and return its path. Runs no model: a report can be written at any time.

    Raises UserError where `root` is no run, or the file cannot be written.
    """
    return write_page(render(read_run(root)), RunDir(root).report)


def render(run: RunRecords) -> str:
    """Return the page."""
    evaluated = [*run.evaluations, *([run.test] if run.test else [])]
    samples, first, last = run_facts.sample_pairs(run)
    environment = run.environment
    command = environment.get("command", "")
    return fill(
        "report.html.jinja",
        styles=("report.css",),
        run=run,
        verdict=run_facts.verdict(run),
        state=run_facts.state(run),
        duration=run_facts.duration(run),
        subtitle=_subtitle(run),
        changes=run_facts.changes(run),
        charts=[(chart, Markup(chart.svg)) for chart in charts_of(run)],
        samples=samples,
        first_step=first,
        last_step=last,
        metrics=[
            metric
            for metric in run_facts.METRICS
            if any(run_facts.number(e, metric.key) is not None for e in evaluated)
        ],
        signatures=_signatures(run),
        data_columns=run_facts.counts(run.data)[0],
        data_rows=run_facts.counts(run.data)[1],
        data_facts=run_facts.pairs(run.data),
        model_facts=run_facts.pairs(environment.get("model", {})),
        versions=environment.get("versions", {}),
        machine_facts=run_facts.pairs(environment.get("machine", {})) + _machine_of(run),
        command=command if isinstance(command, str) else shlex.join(command),
    )


def _subtitle(run: RunRecords) -> list[str]:
    """What stands under the title: model, kind of data, date."""
    model = run.environment.get("model", {})
    named = model.get("architecture", "")
    if size := model.get("parameters", 0):
        named += f", {size / 1e6:,.1f} M parameters" if size >= 1e6 else f", {size:,} parameters"
    parts = [named, run.data.get("format", "")]
    return [part for part in [*parts, run.environment.get("started", "")[:10]] if part]


def _machine_of(run: RunRecords) -> list[tuple[str, str]]:
    keys = ("device", "precision", "processes", "started")
    return run_facts.pairs({key: run.environment[key] for key in keys if key in run.environment})


def _signatures(run: RunRecords) -> list[tuple[str, str]]:
    """sacrebleu's signatures of the last evaluation that has any."""
    known = [
        [
            (metric.name, evaluation[f"{metric.key}_signature"])
            for metric in run_facts.METRICS
            if f"{metric.key}_signature" in evaluation
        ]
        for evaluation in run.evaluations
    ]
    return next((found for found in reversed(known) if found), [])
