"""`finetune train`: a config becomes a run.

Floor 5.
"""

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object

from finetune.config import RunConfig, dump_config
from finetune.data.batches.stream import StreamingBatches
from finetune.data.formats.translation import TranslationFormat
from finetune.display import Display
from finetune.distributed.engines import let_go, prepare, reading
from finetune.errors import UserError
from finetune.models.describe import describe_model
from finetune.optim import build_lr_scheduler, build_optimizer, check_optimizer
from finetune.recipes.build.data import generation_metrics
from finetune.recipes.build.material import read_material
from finetune.recipes.build.optimizer import optimizer_options
from finetune.recipes.build.parts import Parts, assemble, make_accelerator, say_counts
from finetune.recipes.train.evaluations import RunEvaluations, check_best
from finetune.recipes.train.finish import finish_run
from finetune.run.environment import collect_environment
from finetune.run.folder import RunDir, step_of
from finetune.run.log import Listener, MetricLogger, forget_after, tracker_values
from finetune.run.records import (
    DataCounts,
    Environment,
    Evaluation,
    StepRecord,
    read_config,
    write_config,
)
from finetune.training.checkpoint import CheckpointStore, agree_on_checkpoint, find_checkpoint
from finetune.training.stopping import DivergenceGuard
from finetune.training.trainer import Cadence, Stopped, Trainer, check_identity


class Observer(Protocol):
    """Who looks on at a run, outside of what is timed: at its start and at each logged record. Its end is the observer's too: an
    observed run leaves checkpoints and metrics, and no model/, evaluation.json or report.html."""

    def start(self, parts: Parts, optimizer: torch.optim.Optimizer) -> None: ...

    def __call__(self, record: StepRecord | Evaluation) -> None: ...

    def finish(self, parts: Parts, optimizer: torch.optim.Optimizer) -> None: ...


def run_training(
    config: RunConfig,
    *,
    resume: str | None = None,
    dry_run: bool = False,
    display: Display | None = None,
    observer: Observer | None = None,
) -> Stopped:
    """Train as the config says and leave the run's folder complete: checkpoints, model/, evaluation.json, report.html.

    Raises UserError for anything wrong with config, data, model, checkpoint, or an occupied output folder.
    """
    check_optimizer(config.optimizer.name, optimizer_options(config))
    run, display = RunDir(config.output_dir), display or Display()
    checkpoint = find_checkpoint(resume, run.checkpoints) if resume is not None else None
    accelerator = make_accelerator(config, display)
    checkpoint = agree_on_checkpoint(checkpoint, accelerator)
    resuming = resume is not None and (
        checkpoint is None or checkpoint.parent.resolve() == run.checkpoints.resolve()
    )
    if not dry_run:
        _refuse_occupied(run, config, accelerator, resuming=resuming)
    with display.warnings():
        material = read_material(config, display)
        parts = assemble(material, accelerator=accelerator, display=display)
        optimizer = build_optimizer(parts.model, config.optimizer.name, **optimizer_options(config))
        check_best(
            config, generation_metrics(config, material.format), material.validation is not None
        )
        if dry_run:
            display.say(f"everything is in order: {parts.num_steps} steps; the resolved config:")
            if accelerator.is_main_process:
                print(dump_config(config), end="")
            return "finished"
        if resume is not None and checkpoint is None:
            display.say("there is no checkpoint to resume from yet: starting from the beginning")
        if checkpoint is not None:
            check_identity(checkpoint, parts.identity)
        _claim(run, accelerator, resuming=resuming)
        return _train(parts, optimizer, run, checkpoint, observer)


def _train(
    parts: Parts,
    raw_optimizer: torch.optim.Optimizer,
    run: RunDir,
    checkpoint: Path | None,
    observer: Observer | None,
) -> Stopped:
    config, accelerator = parts.config, parts.accelerator
    scheduler = _make_scheduler(raw_optimizer, config, parts.num_steps)
    module, optimizer, average_rows = prepare(
        accelerator, parts.language_model, raw_optimizer, parts.display
    )
    with parts.display.steps(
        parts.num_steps, 0 if checkpoint is None else step_of(checkpoint)
    ) as show:
        logger = MetricLogger(
            run.metrics, listeners=(show, *_trackers(parts, run), *([observer] if observer else []))
        )
        evaluations = RunEvaluations(parts, run, logger)
        evaluate = reading(accelerator, module, evaluations)
        trainer = Trainer(
            accelerator=accelerator,
            model=module,
            optimizer=optimizer,
            scheduler=scheduler,
            batches=parts.batches,
            evaluate=evaluate,
            cadence=_cadence(parts),
            checkpoints=CheckpointStore(
                run.checkpoints,
                config.checkpoint.keep,
                is_main=accelerator.is_main_process,
                gather=gather_object if accelerator.num_processes > 1 else list,
            ),
            logger=logger,
            guard=DivergenceGuard(threshold=config.training.divergence_threshold),
            max_grad_norm=config.training.max_grad_norm,
            seed=config.seed,
            identity=parts.identity,
            bad_batch_path=run.bad_batch,
            average_rows=average_rows,
            before_step=parts.vocabulary.before_step,
        )
        if checkpoint is not None:
            forgotten = trainer.resume(checkpoint)
            parts.display.say(f"resuming after step {trainer.progress.step}, from {checkpoint}")
            if forgotten is not None:
                parts.display.note(
                    f"the checkpoint of step {forgotten}, the best so far, is not in {run.checkpoints}: not counted"
                )
        if accelerator.is_main_process:
            _write_records(parts, run)
            forget_after(run, trainer.progress.step if checkpoint is not None else -1)
        if observer is not None:
            observer.start(parts, raw_optimizer)
        if config.evaluation.before and checkpoint is None:
            evaluate(0)
        stopped = trainer.train()
    if isinstance(parts.batches, StreamingBatches) and accelerator.is_main_process:
        say_counts(parts.display, "training", parts.material.format, parts.statistics, config)
        _write_counts(parts, run)
    if stopped == "signal":
        parts.display.say(
            f"stopped by a signal after step {trainer.progress.step}, which is saved; go on with --resume auto"
        )
    elif observer is not None:
        observer.finish(parts, raw_optimizer)
    else:
        finish_run(parts, run, trainer, evaluations, stopped)
    let_go(module)
    accelerator.end_training()
    return stopped


def _make_scheduler(
    optimizer: torch.optim.Optimizer, config: RunConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    section = config.scheduler
    warmup = (
        math.ceil(section.warmup_ratio * num_steps)
        if section.warmup_steps is None
        else section.warmup_steps
    )
    return build_lr_scheduler(
        optimizer,
        section.name,
        num_steps=num_steps,
        warmup_steps=min(warmup, num_steps),
        min_lr_ratio=section.min_lr_ratio,
    )


def _cadence(parts: Parts) -> Cadence:
    config, per_epoch = parts.config, parts.batches.steps_per_epoch
    every = config.evaluation.every or per_epoch or parts.num_steps
    best = config.evaluation.best
    return Cadence(
        num_steps=parts.num_steps,
        evaluate_every=every,
        checkpoint_every=config.checkpoint.every,
        best=best,
        higher_is_better=best != "loss",
        patience=config.evaluation.early_stopping_patience,
    )


def _refuse_occupied(
    run: RunDir, config: RunConfig, accelerator: Accelerator, *, resuming: bool
) -> None:
    """Raise UserError where another run lies in the folder. Process 0 looks, the others wait."""
    if (
        accelerator.is_main_process
        and run.has_started()
        and not resuming
        and not config.overwrite_output_dir
    ):
        raise UserError(
            f"{run.root} holds another run; go on with it by --resume auto, name another output_dir, or set "
            f"overwrite_output_dir=true to delete it"
        )
    accelerator.wait_for_everyone()


def _claim(run: RunDir, accelerator: Accelerator, *, resuming: bool) -> None:
    """Make the folder ours, once everything else is known to be in order. Process 0 acts, the others wait."""
    if accelerator.is_main_process:
        if run.is_run() and not resuming:
            run.clear()
        try:
            run.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=run.root):
                pass
        except OSError as error:
            raise UserError(
                f"the run's folder {run.root} cannot be written: {error.strerror}"
            ) from error
    accelerator.wait_for_everyone()


def _say_changes(run: RunDir, config: RunConfig, display: Display) -> None:
    """Name the settings that differ from those that the run was started with."""
    try:
        then = _flat(yaml.safe_load(read_config(run)))
    except yaml.YAMLError as error:
        raise UserError(f"{run.config} is not valid YAML: restore it, or remove it") from error
    now = _flat(yaml.safe_load(dump_config(config)))
    changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if changed:
        display.note(
            "resumed with changed settings: "
            + ", ".join(f"{key} {then.get(key)} -> {now.get(key)}" for key in changed)
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, item in tree.items()
        for key, value in _flat(item, f"{prefix}.{name}".lstrip(".")).items()
    }


def _write_records(parts: Parts, run: RunDir) -> None:
    """What the run is made of. A resumed run keeps the command that it was started with."""
    accelerator = parts.accelerator
    if run.is_run():
        _say_changes(run, parts.config, parts.display)
    write_config(run, dump_config(parts.config))
    record = collect_environment(
        processes=accelerator.num_processes,
        device=str(accelerator.device),
        precision=accelerator.mixed_precision.replace("no", "fp32"),
    )
    replace(
        record,
        command=Environment.read(run).command or record.command,
        model=describe_model(parts.model),
        notes=parts.display.notes,
    ).write(run)
    _write_counts(parts, run)


def _write_counts(parts: Parts, run: RunDir) -> None:
    """What was read and what became of it; of a stream so far."""
    format, held_out = parts.material.format, parts.material.validation
    DataCounts(
        format=format.name,
        train=parts.statistics.as_dict(),
        languages=format.languages if isinstance(format, TranslationFormat) else None,
        validation=None if held_out is None else held_out.statistics.as_dict(),
    ).write(run)


def _trackers(parts: Parts, run: RunDir) -> tuple[Listener, ...]:
    if not parts.config.tracking:
        return ()
    settings = {
        key: str(value) for key, value in _flat(parts.config.model_dump(mode="json")).items()
    }
    parts.accelerator.init_trackers(run.root.name, config=settings)
    return (lambda record: parts.accelerator.log(tracker_values(record), step=record.step),)
