"""The end of a run: the best weights, the exported model with its card, the summary, the report."""

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.distributed.sharding import is_sharded
from finetune.errors import UserError
from finetune.models.export import export_model
from finetune.recipes.build.card import run_card
from finetune.recipes.build.model import model_of_checkpoint
from finetune.recipes.build.parts import Parts
from finetune.recipes.train.evaluations import RunEvaluations
from finetune.report import write_report
from finetune.run.folder import RunDir
from finetune.run.records import Environment, Evaluations, Vocabulary
from finetune.training.checkpoint import damage_of
from finetune.training.trainer import Stopped, Trainer


@dataclass(frozen=True)
class LiveRun:
    """A run whose model is in memory: at its start, between its steps, or at its end."""

    parts: Parts
    folder: RunDir
    trainer: Trainer
    evaluations: RunEvaluations
    finished: bool = False  # at its start: model/ and evaluation.json are of this end


def is_finished(run: RunDir, step: int, *, best: bool) -> bool:
    """Return whether model/ and evaluation.json are those of an end after `step`.

    `best`: model/ is to have the weights of the best evaluation, and not the last ones.
    """
    try:
        summary = Evaluations.read(run)
    except UserError:  # damaged; it is made again
        return False
    if summary.end != step or not (run.model / "config.json").is_file():
        return False
    wanted = summary.best.step if best and summary.best is not None else step
    return summary.after is None or summary.after.step == wanted


def finish_run(live: LiveRun, stopped: Stopped) -> None:
    """Write model/ with its card, evaluation.json and report.html.

    evaluation.json comes after model/: it says that the run has come to its end. Of a run that was
    finished at its start only the report is written.
    """
    parts, run, trainer = live.parts, live.folder, live.trainer
    progress, accelerator, display = trainer.progress, parts.accelerator, parts.display
    if live.finished:
        _write_report(run, parts)
        return
    if stopped == "early stopping":
        since = f": no improvement since step {progress.best_step}"
        is_known = progress.best_step != progress.step  # else an earlier best was forgotten
        display.note(f"stopped early at step {progress.step}{since if is_known else ''}")
    chosen, sharded = progress.step, is_sharded(parts.language_model)
    if parts.config.checkpoint.save_best_model and progress.best_step not in (None, progress.step):
        assert progress.best_step is not None
        chosen = progress.best_step
        display.note(f"model/ holds the weights of step {chosen}, the best evaluation")
    checkpoint = trainer.checkpoints.path(chosen)
    if chosen != progress.step and (damage := damage_of(checkpoint)) is not None:
        raise UserError(
            f"{checkpoint}, the best evaluation, is damaged: {damage}. Set "
            "checkpoint.save_best_model=false and go on with --resume auto, to export the last step"
        )
    if chosen != progress.step and not sharded:
        trainer.restore(checkpoint)
    if accelerator.is_main_process:
        _write_vocabulary(parts, run)
        summary = live.evaluations.summarize(
            best_step=progress.best_step, model_step=chosen, last_step=progress.step
        )
        export_model(
            # of a sharded model no process has the whole, but a checkpoint has
            model_of_checkpoint(parts.config, checkpoint, parts.material.tokenizer)
            if sharded
            else parts.language_model.model,
            parts.material.tokenizer,
            run.model,
            card=run_card(run, parts.config, _named(summary, chosen)),
        )
        record = Environment.read(run)
        memory = round(_peak_memory(accelerator.device) / 2**30, 2)
        peak = max(memory, record.peak_memory_gib or 0)  # that of an earlier start counts too
        replace(record, notes=display.notes, warned=display.warned, peak_memory_gib=peak).write(run)
        summary.write(run)
    _write_report(run, parts)


def _write_report(run: RunDir, parts: Parts) -> None:
    """Write the report, and say where it is and where the model is."""
    if parts.accelerator.is_main_process:
        write_report(run.root)
        parts.display.say(f"model:  {run.model}")
        parts.display.say(f"report: {run.report}")
    parts.accelerator.wait_for_everyone()


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: on a GPU by tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux


def _named(summary: Evaluations, chosen: int) -> dict[str, Mapping[str, Any]]:
    """Return the figures under the name of their step, and say which are those of the model."""
    found = [part for part in (summary.before, summary.after, summary.best) if part is not None]
    return {
        f"step {part.step}{', this model' if part.step == chosen else ''}": part.metrics
        for part in found
    }


def _write_vocabulary(parts: Parts, run: RunDir) -> None:
    inactive, plan = parts.vocabulary.inactive_tokens(), parts.vocabulary.plan
    used = list(range(plan.rows)) if inactive is None else (~inactive).nonzero()[:, 0].tolist()
    Vocabulary(chosen=parts.vocabulary.line(), used=used).write(run)
