"""The evaluations of a run: held-out loss, metrics over generated text, samples, and the files they go to.

Floor 5.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from finetune.config.schema import GenerationSection, RunConfig
from finetune.data.encode import EncodedDataset
from finetune.data.types import Prompt
from finetune.display import differences, format_metrics
from finetune.errors import UserError
from finetune.evaluation import LossResult, Sample, evaluate_generation, evaluate_loss
from finetune.inference.generation import GenerationSettings
from finetune.models.describe import CausalLM
from finetune.models.speed import uncompiled
from finetune.models.tokenizers import stop_ids
from finetune.recipes.data import first_prompts, generation_metrics
from finetune.recipes.parts import Parts
from finetune.run_dir import RunDir
from finetune.tracking import MetricLogger, finite


class Evaluator:
    """Called with a step, evaluates the model as it is, logs the metrics, and returns them."""

    def __init__(self, parts: Parts, run: RunDir, logger: MetricLogger) -> None:
        config = parts.config
        self.parts, self.run, self.logger = parts, run, logger
        self.metrics = generation_metrics(config, parts.format)
        count = config.evaluation.generate if self.metrics else config.evaluation.samples
        room = config.generation.max_new_tokens
        prompts = first_prompts(
            parts.raw.validation,
            parts.format,
            count,
            model=parts.model,
            room=room,
            note=parts.display.note,
        )
        if self.metrics and parts.validation is not None and not prompts:
            raise UserError(
                f"no held-out row gives a prompt to compute {' and '.join(self.metrics)} from: give other held-out data, lower "
                f"generation.max_new_tokens, which is {room}, or set evaluation.generate=0"
            )
        self.prompts = own_block(prompts, parts.accelerator)
        self.records: dict[int, dict[str, Any]] = {}

    def __call__(self, step: int) -> dict[str, Any]:
        if self.parts.validation is None and self.parts.unrelated is None:
            return {}
        started = time.perf_counter()
        results = self._losses() | self._generation(step)
        results["seconds"] = round(time.perf_counter() - started, 3)
        if self.parts.accelerator.is_main_process:
            self.logger.log({"step": step, "evaluation": results})
        self.records[step] = results
        return results

    def _losses(self) -> dict[str, Any]:
        parts = self.parts
        results: dict[str, Any] = {}
        if parts.validation is not None:
            inactive = parts.vocabulary.inactive_tokens()
            results = self._loss(parts.validation, inactive).as_dict()
            if (
                inactive is not None and parts.config.data.streaming
            ):  # in which tokens turn up that were inactive before
                results["active_tokens"] = int((~inactive).sum())
        if parts.unrelated is not None:
            results["unrelated_loss"] = self._loss(parts.unrelated).loss
        return results

    def _loss(self, dataset: EncodedDataset, inactive: torch.Tensor | None = None) -> LossResult:
        parts, batches = self.parts, self.parts.evaluation_batches(dataset)
        accelerator = parts.accelerator
        with (
            parts.display.bar("evaluating the loss", len(batches)) as advance,
            accelerator.autocast(),
        ):
            return evaluate_loss(
                parts.language_model,
                batches,
                tokenizer=parts.tokenizer,
                device=accelerator.device,
                reduce=lambda sums: accelerator.reduce(
                    sums.to(accelerator.device), reduction="sum"
                ).cpu(),
                inactive=inactive,
                on_progress=lambda done: advance(1),
            )

    def _generation(self, step: int) -> dict[str, Any]:
        parts, config = self.parts, self.parts.config
        total = len(self.prompts)
        if parts.validation is None or (not self.metrics and config.evaluation.samples == 0):
            return {}
        eager = uncompiled(parts.config.training.compile)
        with parts.display.bar("generating", total) as advance, parts.accelerator.autocast(), eager:
            scores, samples = evaluate_generation(
                parts.language_model.model,
                parts.tokenizer,
                self.prompts,
                metrics=self.metrics,
                batch_size=config.generation.batch_size,
                inactive=parts.vocabulary.inactive_tokens(),
                gather=(lambda own: gather_object(own))
                if parts.accelerator.num_processes > 1
                else (lambda own: own),
                on_progress=differences(advance),
                settings=generation_settings(
                    config.generation, parts.language_model.model, seed=config.seed
                ),
            )
        if parts.accelerator.is_main_process:
            write_samples(self.run, step, samples[: config.evaluation.samples])
        return dict(scores)

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
            self.parts.display.say("held-out before: " + format_metrics(before))
            self.parts.display.say("held-out after:  " + format_metrics(after))
            if best["step"] != after["step"]:
                self.parts.display.say(
                    f"held-out best:   {format_metrics(best)}  (step {best['step']})"
                )
            first, last = (record.get("active_tokens", 0) for record in (before, after))
            if first != last:
                self.parts.display.note(
                    "the inactive mass after is over fewer tokens and does not compare: "
                    f"{first:,} were active before, {last:,} then"
                )


def generation_settings(
    section: GenerationSection, model: CausalLM, *, seed: int | None
) -> GenerationSettings:
    """Return the settings of `section`, with the tokens that end an answer of `model`."""
    settings = section.model_dump(exclude={"batch_size"})
    return GenerationSettings(**settings, stop_ids=stop_ids(model), seed=seed)


def own_block(prompts: Sequence[Prompt], accelerator: Accelerator) -> list[Prompt]:
    """This process's stretch of the prompts; the stretches of all processes in order are the whole."""
    count, rank = accelerator.num_processes, accelerator.process_index
    return list(prompts[rank * len(prompts) // count : (rank + 1) * len(prompts) // count])


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
