"""The evaluations of a run: measured, logged, kept as samples, and summed up at the end."""

import json
import time
from collections.abc import Sequence
from typing import Any

from finetune.config import RunConfig
from finetune.display import format_metrics
from finetune.errors import UserError
from finetune.evaluation import Sample
from finetune.recipes.data import generation_metrics
from finetune.recipes.evaluator import Evaluator
from finetune.recipes.parts import Parts
from finetune.run_dir import RunDir
from finetune.tracking import MetricLogger, finite


class RunEvaluations:
    """Called with a step, evaluates the model as it is, logs the metrics, and returns them."""

    def __init__(self, parts: Parts, run: RunDir, logger: MetricLogger) -> None:
        self.parts, self.run, self.logger = parts, run, logger
        self.display = parts.display
        self.evaluator = evaluator_of(parts)
        self.records: dict[int, dict[str, Any]] = {}

    def __call__(self, step: int) -> dict[str, Any]:
        material, main = self.parts.material, self.parts.accelerator.is_main_process
        if material.validation is None and material.unrelated is None:
            return {}
        started = time.perf_counter()
        results, samples = self.evaluator.evaluate()
        inactive = self.parts.vocabulary.inactive_tokens()
        # in a stream, tokens that were inactive become active
        if material.config.data.streaming and material.validation and inactive is not None:
            results["active_tokens"] = int((~inactive).sum())
        if main and samples:
            write_samples(self.run, step, samples[: material.config.evaluation.samples])
        results["seconds"] = round(time.perf_counter() - started, 3)
        if main:
            self.logger.log({"step": step, "evaluation": results})
        self.records[step] = results
        return results

    def write_summary(self, *, best_step: int | None, last_step: int) -> None:
        """evaluation.json: before, after and best, from the evaluations logged so far (also those of the run before a resume)."""
        records = {**logged_evaluations(self.run), **self.records}
        summary = {}
        for name, step in (("before", 0), ("after", last_step), ("best", best_step)):
            if step in records:
                summary[name] = {"step": step, **records[step]}
        self.run.evaluation.write_text(json.dumps(finite(summary), indent=2), encoding="utf-8")
        if {"before", "after"} <= summary.keys():
            before, after, best = (
                summary["before"],
                summary["after"],
                summary.get("best", summary["after"]),
            )
            self.display.say("held-out before: " + format_metrics(before))
            self.display.say("held-out after:  " + format_metrics(after))
            if best["step"] != after["step"]:
                self.display.say(f"held-out best:   {format_metrics(best)}  (step {best['step']})")
            first, last = (record.get("active_tokens", 0) for record in (before, after))
            if first != last:
                self.display.note(
                    "the inactive mass after is over fewer tokens and does not compare: "
                    f"{first:,} were active before, {last:,} then"
                )


def evaluator_of(parts: Parts) -> Evaluator:
    """Return the evaluator of a run, which answers as many prompts as the config asks for."""
    section = parts.config.evaluation
    scored = generation_metrics(parts.config, parts.material.format)
    return Evaluator(
        parts.material,
        parts.language_model,
        parts.accelerator,
        num_answers=section.generate if scored else section.samples,
        display=parts.display,
        inactive=parts.vocabulary.inactive_tokens,
    )


def check_best(config: RunConfig, metrics: Sequence[str], has_validation: bool) -> None:
    """Raise UserError where the best checkpoint, or early stopping, goes by a number that will not be there."""
    best = config.evaluation.best
    if best != "loss" and config.evaluation.generate == 0:
        raise UserError(
            f"evaluation.best is {best}, but evaluation.generate is 0: nothing would be generated to compute it from"
        )
    if best != "loss" and best not in metrics:
        raise UserError(
            f"evaluation.best is {best}, which is not computed here: set evaluation.metrics=[{best}], or best: loss"
        )
    if config.evaluation.early_stopping_patience is not None and not has_validation:
        raise UserError(
            "evaluation.early_stopping_patience needs held-out data: give data.validation or data.validation_fraction"
        )


def write_samples(run: RunDir, step: int, samples: Sequence[Sample]) -> None:
    with run.samples.open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")


def logged_evaluations(run: RunDir) -> dict[int, dict[str, Any]]:
    """Step -> what was measured after it, from metrics.jsonl."""
    if not run.metrics.is_file():
        return {}
    records = (json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["evaluation"] for record in records if "evaluation" in record}
