"""`report.html`: one self-contained page made from the files of a run.

It needs no network, no script and no other file. Its content security policy forbids them.
"""

import shlex
from pathlib import Path

from markupsafe import Markup

from finetune.report import run_facts
from finetune.report.html import fill_template, write_page
from finetune.report.records import RunRecords, read_run
from finetune.report.run_charts import charts_of
from finetune.run_dir import RunDir


def write_report(root: Path) -> Path:
    """Write report.html into the run's folder and return its path.

    No model is run, so a report can be written at any time.
    Raises UserError if `root` is not a run, or if the file cannot be written.
    """
    return write_page(_render(read_run(root)), RunDir(root).report)


def _render(run: RunRecords) -> str:
    evaluated = [*run.evaluations, *([run.test] if run.test else [])]
    samples, first, last = run_facts.sample_pairs(run)
    environment = run.environment
    command = environment.get("command", "")
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
            for metric in run_facts.METRICS
            if any(run_facts.number(e, metric.key) is not None for e in evaluated)
        ],
        signatures=_signatures(run),
        data_columns=run_facts.counts(run.data)[0],
        data_lines=run_facts.counts(run.data)[1],
        data_facts=run_facts.pairs(run.data),
        model_facts=run_facts.pairs(environment.get("model", {})),
        versions=environment.get("versions", {}),
        machine_facts=run_facts.pairs(environment.get("machine", {})) + _machine_of(run),
        command=command if isinstance(command, str) else shlex.join(command),
    )


def _subtitle(run: RunRecords) -> list[str]:
    """Return the parts of the line under the title: model, kind of data, date."""
    model = run.environment.get("model", {})
    named = model.get("architecture", "")
    if number := model.get("parameters", 0):
        named += f", {run_facts.parameter_count(number)}"
    parts = [named, run.data.get("format", "")]
    return [part for part in [*parts, run.environment.get("started", "")[:10]] if part]


def _machine_of(run: RunRecords) -> list[tuple[str, str]]:
    keys = ("device", "precision", "processes", "started")
    return run_facts.pairs({key: run.environment[key] for key in keys if key in run.environment})


def _signatures(run: RunRecords) -> list[tuple[str, str]]:
    """Return sacrebleu's signatures from the last evaluation that has any."""
    known = [
        [
            (metric.name, evaluation[f"{metric.key}_signature"])
            for metric in run_facts.METRICS
            if f"{metric.key}_signature" in evaluation
        ]
        for evaluation in run.evaluations
    ]
    return next((found for found in reversed(known) if found), [])
