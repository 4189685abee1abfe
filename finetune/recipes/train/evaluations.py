"""The evaluations of a run: measured, logged, kept as samples, and summed up at the end."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.compute.products import return_freed_memory
from finetune.config import RunConfig
from finetune.display import format_metrics
from finetune.errors import UserError
from finetune.recipes.build.evaluator import Evaluator
from finetune.recipes.build.parts import Parts
from finetune.report import write_report
from finetune.run.folder import RunDir
from finetune.run.log import MetricLogger, keep_samples
from finetune.run.records import Evaluation, Evaluations, Sample, evaluations_by_step


class RunEvaluations:
    """The evaluations of a run. A call with a step evaluates the model as it is at that step.

    It logs the metrics, keeps samples, and returns the metrics.
    """

    def __init__(
        self, parts: Parts, evaluator: Evaluator, run: RunDir, logger: MetricLogger
    ) -> None:
        self.parts, self.evaluator, self.run, self.logger = parts, evaluator, run, logger
        self.display = parts.display
        self.records: dict[int, Evaluation] = {}
        self.live_report = LiveReport(run.root)

    def __call__(self, step: int) -> dict[str, Any]:
        material, main = self.parts.material, self.parts.accelerator.is_main_process
        if material.validation is None and material.unrelated is None:
            return {}
        started = time.perf_counter()
        return_freed_memory()  # a step's, which would add to what the evaluation takes
        results, answers = self.evaluator.evaluate()
        inactive = self.parts.vocabulary.inactive_tokens()
        # in a stream, tokens that were inactive become active
        if material.config.data.streaming and material.validation and inactive is not None:
            results["active_tokens"] = int((~inactive).sum())
        if main and answers:
            kept = answers[: material.config.evaluation.samples]
            samples = [
                Sample(step, a["prompt"], a["reference"], a["output"], a["cut"], a["language"])
                for a in kept
            ]
            keep_samples(self.run, samples)
        results["seconds"] = round(time.perf_counter() - started, 3)
        self.records[step] = Evaluation(step, results)
        if main:
            self.logger.log(self.records[step])
            self.live_report.write()
        return results

    def summarize(self, *, best_step: int | None, model_step: int, last_step: int) -> Evaluations:
        """Report and return the evaluations before, after (of the weights in model/), and the best.

        Evaluations from before a resume count too. Figures on test data stay if the others do:
        then the model is the one that they were measured on.
        """
        records = {**evaluations_by_step(self.run), **self.records}
        before, after = records.get(0), records.get(model_step)
        best = None if best_step is None else records.get(best_step)
        summary = Evaluations(before, after, best, last_step=last_step)
        try:
            earlier = Evaluations.read(self.run)
        except UserError:
            self.display.warn(f"{self.run.evaluation} is damaged. It is made again")
            earlier = Evaluations()
        if replace(earlier, test=None, last_step=earlier.end).as_dict() == summary.as_dict():
            summary = replace(summary, test=earlier.test)
        if before is not None and after is not None:
            self.display.say("held-out before: " + format_metrics(before.metrics))
            if after.step < last_step and (last := records.get(last_step)) is not None:
                self.display.say(
                    f"held-out last:   {format_metrics(last.metrics)}  (step {last_step})"
                )
            kept = f"  (step {after.step}, the best, in model/)" if after.step < last_step else ""
            self.display.say(f"held-out after:  {format_metrics(after.metrics)}{kept}")
            if best is not None and best.step != after.step:
                self.display.say(
                    f"held-out best:   {format_metrics(best.metrics)}  (step {best.step})"
                )
            active, then = (part.metrics.get("active_tokens", 0) for part in (before, after))
            if active != then:
                self.display.note(
                    "the inactive mass after is over fewer tokens and does not compare: "
                    f"{active:,} were active before, {then:,} then"
                )
        return summary


class LiveReport:
    """report.html during a run: written again if the last writing took 1 % of the time since."""

    def __init__(self, root: Path) -> None:
        self._root, self._written, self._seconds = root, time.perf_counter(), 1.0

    def write(self) -> None:
        """Write the report, if enough time has passed."""
        started = time.perf_counter()
        if started - self._written < 100 * self._seconds:
            return
        write_report(self._root, live=True)
        self._written = time.perf_counter()
        self._seconds = self._written - started


def check_best(config: RunConfig, metrics: Sequence[str], has_validation: bool) -> None:
    """Raise UserError if the best checkpoint, or early stopping, needs a figure that is missing."""
    best = config.evaluation.best
    if best != "loss" and config.evaluation.generate == 0:
        raise UserError(
            f"evaluation.best is {best}, but evaluation.generate is 0, so nothing is generated to "
            "compute it from. Set evaluation.generate, or evaluation.best=loss"
        )
    if best != "loss" and best not in metrics:
        raise UserError(
            f"evaluation.best is {best}, which is not computed here. "
            f"Set evaluation.metrics=[{best}], or evaluation.best=loss"
        )
    if config.evaluation.early_stopping_patience is not None and not has_validation:
        raise UserError(
            "evaluation.early_stopping_patience needs held-out data. "
            "Give data.validation or data.validation_fraction"
        )
