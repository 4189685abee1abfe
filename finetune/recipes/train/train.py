"""`finetune train`: a config becomes a run."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR

from finetune.config import RunConfig, dump_config
from finetune.config.values import MOST
from finetune.data.batches.stream import StreamingBatches
from finetune.display import Display
from finetune.distributed.engines import let_go, prepare, with_whole_model
from finetune.errors import UserError
from finetune.models.tokenizers import pad_id
from finetune.optim import check_optimizer
from finetune.recipes.build.accelerator import TRACKING, make_accelerator
from finetune.recipes.build.data import generation_metrics
from finetune.recipes.build.evaluator import Evaluator, evaluator_of
from finetune.recipes.build.material import read_material
from finetune.recipes.build.optimizer import (
    longer_warmup,
    low_rate,
    make_optimizer,
    make_scheduler,
    may_be_lazy,
    optimizer_options,
)
from finetune.recipes.build.parts import (
    Parts,
    assemble,
    evaluation_seconds,
    evaluation_steps,
    evaluations_of_stream,
    say_stream,
)
from finetune.recipes.train.evaluations import RunEvaluations, check_best
from finetune.recipes.train.finish import LiveRun, finish_run, is_finished
from finetune.recipes.train.start import (
    as_begun,
    changed_settings,
    claim,
    find_beginning,
    find_start,
    flat_settings,
    hold_folder,
    write_counts,
    write_records,
)
from finetune.report import write_report
from finetune.run.folder import RunDir, run_of, step_of
from finetune.run.log import Listener, MetricLogger, forget_after, tracker_values
from finetune.run.records import evaluations_by_step
from finetune.run.wording import clock, counted
from finetune.training.cadence import Cadence
from finetune.training.checkpoint import CheckpointStore, check_identity, load
from finetune.training.clock import Clock
from finetune.training.probe import check_device
from finetune.training.stopping import DivergenceGuard, NoBatch
from finetune.training.trainer import Stopped, Trainer
from finetune.training.vocabulary import measuring_batches

AT_MOST_LOST = 1800.0
"""Seconds of training that a kill may cost a run that does not say when it is saved."""


def run_training(
    config: RunConfig,
    *,
    resume: str | None = None,
    dry_run: bool = False,
    display: Display | None = None,
    listener: Listener | None = None,
    on_start: Callable[[LiveRun], None] = lambda live: None,
    finish: Callable[[LiveRun, Stopped], None] = finish_run,
) -> Stopped:
    """Train as the config says, and leave the run's folder complete.

    `resume`: "auto" (the newest complete checkpoint of the folder, if any), or the folder of a
    checkpoint or a run. `dry_run` builds everything and stops before the first step. `listener`
    gets each logged record, outside of what is timed. `on_start` is called before the first step,
    and `finish` after the last one unless a signal stopped the run. The default writes model/,
    evaluation.json and report.html.

    Raises UserError for anything wrong with config, data, model, checkpoint or folder.
    """
    check_optimizer(config.optimizer.name, optimizer_options(config))
    may_be_lazy(config)  # raises if optimizer.lazy asks for what cannot be
    run, display = RunDir(config.output_dir), display or Display()
    accelerator = make_accelerator(config, display)
    if dry_run:
        with hold_folder(run, accelerator, display), display.warnings():
            found = None if resume is None else find_beginning(resume, run)
            begun = config if found is None else as_begun(found, config)
            parts = _build(begun, accelerator, display).parts
        if run.has_started() and resume is None and not config.overwrite_output_dir:
            display.note(f"{run.root} holds a run, which --resume auto would continue")
        display.say(f"everything is in order: {_length_of(parts)}; the resolved config:")
        if accelerator.is_main_process:
            print(dump_config(parts.config), end="")
        return "finished"
    with hold_folder(run, accelerator, display), display.warnings():
        checkpoint, resuming = find_start(resume, run, config, accelerator, display)
        if checkpoint is not None:
            config = as_begun(checkpoint, config)
        built = _build(config, accelerator, display)
        parts = built.parts
        if resume is not None and checkpoint is None:
            display.say("there is no checkpoint to resume from: starting from the beginning")
        if checkpoint is not None:
            earlier = run_of(checkpoint)
            check_identity(
                checkpoint,
                parts.identity,
                lambda: changed_settings(earlier, parts.config, "data.") or [],
            )
        claim(run, accelerator, resuming=resuming)
        with contextlib.ExitStack() as stack:
            stopped = _train(built, run, checkpoint, listener, on_start, finish, stack)
        accelerator.end_training()
    return stopped


@dataclass(frozen=True)
class _Built:
    """What a run needs. All of it is made before anything in its folder changes."""

    parts: Parts
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    evaluator: Evaluator


def _build(config: RunConfig, accelerator: Accelerator, display: Display) -> _Built:
    """Return what the run needs. Raises UserError for anything that is wrong with it."""
    material = read_material(config, display)
    parts = assemble(material, accelerator=accelerator, display=display)
    material = parts.material
    sharded = accelerator.distributed_type is DistributedType.FSDP
    optimizer = make_optimizer(parts.model, config, sharded=sharded, note=display.note)
    metrics = generation_metrics(config, material.format)
    check_best(config, metrics, material.validation is not None)
    scheduler = make_scheduler(optimizer, config, parts.num_steps)
    evaluator = evaluator_of(parts)
    if accelerator.device.type == "mps":
        batch = next(measuring_batches(material.train, pad_id=pad_id(material.tokenizer)))
        check_device(parts.language_model, batch, accelerator.device, key="training.device=cpu")
        display.note("mps: a small batch gave the loss and the gradients of the CPU")
    examples = counted(material.examples_per_step, "example")
    display.say(f"{_length_of(parts)}, each of about {examples}")
    cadence, warmup = evaluations_of_stream(config), longer_warmup(config, parts.num_steps)
    for sentence in (cadence, warmup, low_rate(config)):
        if sentence is not None:
            display.note(sentence)
    for sentence in material.advice():
        display.warn(sentence)
    return _Built(parts, optimizer, scheduler, evaluator)


def _train(
    built: _Built,
    run: RunDir,
    checkpoint: Path | None,
    listener: Listener | None,
    on_start: Callable[[LiveRun], None],
    finish: Callable[[LiveRun, Stopped], None],
    stack: contextlib.ExitStack,
) -> Stopped:
    """Take the steps of a run, from `checkpoint` on, and finish it. `stack` closes its log."""
    parts = built.parts
    display, is_main = parts.display, parts.accelerator.is_main_process
    first_step = 0 if checkpoint is None else step_of(checkpoint)
    limit, total = parts.config.training.max_time, parts.num_steps
    shown = None if limit is not None and total == MOST else total
    if limit is not None and checkpoint is not None:
        limit -= load(checkpoint, "training.pt")["progress"].get("seconds", 0.0)
    with display.steps(shown, first_step, limit=limit) as show:
        trackers = _trackers(parts, run, None if checkpoint is None else first_step + 1)
        listeners = (show, *trackers, *([listener] if listener else []))
        live = _make_trainer(built, run, MetricLogger(run.metrics, listeners=listeners))
        if checkpoint is not None:
            live = _go_on(live, checkpoint)
        trainer = live.trainer
        begun = trainer.progress.step if checkpoint is not None else -1
        if is_main:
            stack.enter_context(display.journal.kept_in(run))
            forget_after(run, begun, evaluated=not trainer.progress.owed)
            if trainer.why_over() is None or not run.config.is_file():
                write_records(parts, run, checkpoint)
        on_start(live)
        if parts.config.evaluation.before and checkpoint is None:
            trainer.evaluate(0)
        stopped: Stopped = "signal"  # unless it comes to an end of its own
        try:
            if trainer.why_over() is not None and not (live.finished or trainer.progress.owed):
                last = evaluations_by_step(run).get(begun) if is_main else None
                trainer.evaluate_end(None if last is None else last.metrics)
            stopped = trainer.train(display.say_at_once)
        except NoBatch:
            newest = trainer.checkpoints.newest() if trainer.progress.step else None
            if newest is not None:
                saved = f"{newest} is saved. Once the data is mended, go on with --resume auto"
                display.answer(saved)
            raise
        finally:
            if stopped == "signal":
                _end_live_report(parts, run)
    if isinstance(parts.batches, StreamingBatches) and is_main and not live.finished:
        say_stream(display, parts)
        write_counts(parts, run)
    if stopped == "signal":
        display.say(
            f"stopped at step {trainer.progress.step}, which is saved. Go on with --resume auto"
        )
    else:
        finish(live, stopped)
    let_go(trainer.model)
    return stopped


def _go_on(live: LiveRun, checkpoint: Path) -> LiveRun:
    """Return the run as it goes on from `checkpoint`, and delete the checkpoints of later steps.

    Of a run that is finished nothing else is deleted. Older checkpoints go if they are not kept,
    but for the best one that the checkpoint knows: there may be no better one any more.
    """
    trainer, run, display = live.trainer, live.folder, live.parts.display
    config, is_main = live.parts.config, live.parts.accelerator.is_main_process
    forgotten = trainer.resume(checkpoint)
    step, over, finished = trainer.progress.step, trainer.why_over(), False
    display.say(f"resuming after step {step}, from {checkpoint}")
    if over is not None:
        display.say(f"the run is finished, and nothing is trained: {over}. Its settings stay")
        best = config.checkpoint.save_best_model
        (finished,) = trainer.on_any_process(is_main and is_finished(run, step, best=best))
    if forgotten is not None and not finished:
        display.note(forgotten)
    # before the log is cut: a kill must leave no checkpoint whose steps are not logged
    if finished:
        trainer.checkpoints.remove_later(step)
    elif run.holds(checkpoint):  # else the folder has no whole one, and the next save clears it
        known = load(checkpoint, "training.pt")["progress"]["best_step"]
        trainer.checkpoints.prune(step, best_step=known)
    return replace(live, finished=finished)


def _end_live_report(parts: Parts, run: RunDir) -> None:
    """Write a report that no longer refreshes itself in the place of one that does."""
    if parts.accelerator.is_main_process and run.report.is_file():
        with contextlib.suppress(UserError):  # the run ends for a reason that matters more
            write_report(run.root)


def _make_trainer(built: _Built, run: RunDir, logger: MetricLogger) -> LiveRun:
    """Give the model to the engine, and make the trainer of the run with its evaluations."""
    parts = built.parts
    config, accelerator = parts.config, parts.accelerator
    module, optimizer, average_rows = prepare(
        accelerator, parts.language_model, built.optimizer, parts.display
    )
    evaluations = RunEvaluations(parts, built.evaluator, run, logger)
    trainer = Trainer(
        accelerator=accelerator,
        model=module,
        optimizer=optimizer,
        scheduler=built.scheduler,
        batches=parts.batches,
        evaluate=with_whole_model(accelerator, module, evaluations),
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
        clock=Clock(limit, accelerator) if (limit := config.training.max_time) else None,
        average_rows=average_rows,
        before_step=parts.vocabulary.before_step,
    )
    return LiveRun(parts, run, trainer, evaluations)


def _length_of(parts: Parts) -> str:
    """Return in words how long the run is."""
    limit, most = parts.config.training.max_time, parts.config.training.max_steps
    if limit is None:
        return f"{parts.num_steps:,} steps"
    return f"steps for {clock(limit)}" + ("" if most is None else f", at most {most:,}")


def _cadence(parts: Parts) -> Cadence:
    config = parts.config
    best, held_out = config.evaluation.best, parts.material.validation
    judged_by = f"{best} {'' if held_out is None else held_out.fingerprint}"
    if best != "loss":  # it is of answers
        settings = config.generation.model_dump(exclude={"batch_size"})
        judged_by += f" {config.evaluation.generate} {settings}"
    return Cadence(
        num_steps=parts.num_steps,
        evaluate_every=evaluation_steps(config, parts.batches.steps_per_epoch),
        evaluate_after=evaluation_seconds(config),
        checkpoint_every=config.checkpoint.every,
        checkpoint_after=AT_MOST_LOST,
        best=best,
        higher_is_better=best != "loss",
        patience=config.evaluation.early_stopping_patience,
        judged_by=judged_by,
    )


def _trackers(parts: Parts, run: RunDir, first: int | None) -> tuple[Listener, ...]:
    """Return what passes records on to the trackers. `first`: the first step that is repeated."""
    if not parts.config.tracking:
        return ()
    settings = {
        key: str(value)
        for key, value in flat_settings(parts.config.model_dump(mode="json")).items()
    }
    options = {} if first is None else {"tensorboard": {"purge_step": first}}
    parts.accelerator.init_trackers(run.root.name, config=settings, init_kwargs=options)
    if "tensorboard" in parts.config.tracking:
        folder = quote(str(run.root / TRACKING))
        parts.display.say(f"to see the curves: tensorboard --logdir {folder}")
    return (lambda record: parts.accelerator.log(tracker_values(record), step=record.step),)
