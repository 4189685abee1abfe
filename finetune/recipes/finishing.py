"""The end of a run: the best weights, the exported model with its card, the summary, the report.

Floor 5.
"""

import json
from typing import Any

from finetune.checkpoint import is_complete
from finetune.distributed.sharding import is_sharded
from finetune.models.export import export_model
from finetune.recipes.evaluations import RunEvaluations
from finetune.recipes.exporting import model_of_checkpoint, run_card
from finetune.recipes.parts import Parts
from finetune.report import write_report
from finetune.run_dir import RunDir
from finetune.trainer import Stopped, Trainer


def finish_run(
    parts: Parts, run: RunDir, trainer: Trainer, evaluations: RunEvaluations, stopped: Stopped
) -> None:
    """Leave `model/`, evaluation.json and report.html behind."""
    progress, accelerator, display = trainer.progress, parts.accelerator, parts.display
    if stopped == "early stopping":
        display.note(
            f"stopped early after step {progress.step}: no better evaluation than that of step {progress.best_step}"
        )
    chosen, sharded = progress.step, is_sharded(parts.language_model)
    if parts.config.checkpoint.save_best_model and progress.best_step not in (None, progress.step):
        assert progress.best_step is not None
        chosen = progress.best_step
        display.note(f"model/ holds the weights of step {chosen}, the best evaluation")
    checkpoint = trainer.checkpoints.path(chosen)
    assert is_complete(checkpoint), checkpoint
    if chosen != progress.step and not sharded:
        trainer.restore(checkpoint)
    if accelerator.is_main_process:
        _write_vocabulary(parts, run)
        evaluations.write_summary(best_step=progress.best_step, last_step=progress.step)
        export_model(
            # of a sharded model no process has the whole, but a checkpoint has
            model_of_checkpoint(run, checkpoint, parts.material.tokenizer)
            if sharded
            else parts.language_model.model,
            parts.material.tokenizer,
            run.model,
            card=run_card(
                run,
                parts.config,
                _named(json.loads(run.evaluation.read_text(encoding="utf-8")), chosen),
            ),
        )
        _add_notes(run, display.notes)
        write_report(run.root)
        display.say(f"model:  {run.model}")
        display.say(f"report: {run.report}")
    accelerator.wait_for_everyone()


def _named(evaluations: dict[str, dict[str, Any]], chosen: int) -> dict[str, dict[str, Any]]:
    """With the step for a name, and which one the model is of."""
    steps = {record["step"]: record for record in evaluations.values()}
    return {
        f"step {step}{', this model' if step == chosen else ''}": record
        for step, record in steps.items()
    }


def _write_vocabulary(parts: Parts, run: RunDir) -> None:
    inactive, plan = parts.vocabulary.inactive_tokens(), parts.vocabulary.plan
    used = list(range(plan.rows)) if inactive is None else (~inactive).nonzero()[:, 0].tolist()
    run.vocabulary.write_text(
        json.dumps({"chosen": parts.vocabulary.line(), "used": used}), encoding="utf-8"
    )


def _add_notes(run: RunDir, notes: list[str]) -> None:
    record = json.loads(run.environment.read_text(encoding="utf-8"))
    run.environment.write_text(json.dumps({**record, "notes": notes}, indent=2), encoding="utf-8")
