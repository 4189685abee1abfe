"""The training loop. It uses what it is given and builds nothing.

**Randomness.** The generators are seeded from (seed, step, process) at each step. So nothing
between the steps (evaluation, generation, saving) can change the run, and a resumed run needs no
saved generator state.
"""

import contextlib
import hashlib
import io
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from finetune.data.batches.dataset import TrainingBatches
from finetune.data.batches.steps import StepBatch
from finetune.data.batches.stream import StreamingBatches
from finetune.errors import UserError
from finetune.optim import LazyAdamW, options_of
from finetune.run.files import write_bytes
from finetune.run.log import MetricLogger
from finetune.run.records import StepRecord
from finetune.training.checkpoint import CheckpointStore, damage_of, load
from finetune.training.step import StepResult, take_step
from finetune.training.stopping import Diverged, DivergenceGuard, StopSignal

Stopped = Literal["finished", "early stopping", "signal"]


@dataclass
class Progress:
    """How far a run is. A checkpoint stores it with weights, optimizer and place in the data."""

    step: int = 0  # optimizer steps taken
    num_target_tokens: int = 0  # seen so far
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    guard: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cadence:
    """How long the run is, and after which optimizer steps it evaluates and saves."""

    num_steps: int
    evaluate_every: int
    checkpoint_every: int | None  # None: at each evaluation
    best: str  # the key of the evaluation that decides which checkpoint is best
    higher_is_better: bool
    patience: int | None  # evaluations without improvement after which the run ends


class Trainer:
    """The training loop of a module that maps a micro-batch to the sum of its token losses in nats.

    Module and optimizer come from the engine (`finetune.distributed.engines.prepare`).
    `evaluate(step)` returns the metrics of the model as it is. `identity` is what a resumed run
    must share with this one. `average_rows` and `before_step` are called in every step, the latter
    with the number of steps taken.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: AcceleratedOptimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        batches: TrainingBatches | StreamingBatches,
        evaluate: Callable[[int], Mapping[str, float]],
        cadence: Cadence,
        checkpoints: CheckpointStore,
        logger: MetricLogger,
        guard: DivergenceGuard,
        max_grad_norm: float,
        seed: int,
        identity: Mapping[str, str],
        bad_batch_path: Path,
        average_rows: Callable[[], None] = lambda: None,
        before_step: Callable[[int, StepBatch], None] = lambda step, batch: None,
    ) -> None:
        self.accelerator, self.model = accelerator, model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.batches, self.evaluate, self.cadence = batches, evaluate, cadence
        self.checkpoints, self.logger, self.guard = checkpoints, logger, guard
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.identity, self.bad_batch_path = dict(identity), bad_batch_path
        self.average_rows, self.before_step = average_rows, before_step
        self.progress = Progress()

    def train(self) -> Stopped:
        """Run to the last step, an early stop, or a signal. Each leaves a complete checkpoint.

        Raises Diverged on a NaN or diverging loss, after saving the batch. Raises UserError if a
        checkpoint cannot be written.
        """
        steps = iter(self.batches)
        with StopSignal() as signal:
            while self.progress.step < self.cadence.num_steps:
                if self._out_of_patience():  # also at once, if a stopped run is resumed
                    return "early stopping"
                record = self._step(next(steps))
                signalled = self._on_any_process(signal.received)
                if self.accelerator.is_main_process:
                    self.logger.log(record)
                improved = self._evaluate_if_due()
                if signalled or self._checkpoint_is_due(improved):
                    self._save()
                if signalled:
                    return "signal"
        return "early stopping" if self._out_of_patience() else "finished"

    def _step(self, batch: StepBatch) -> StepRecord:
        started = time.perf_counter()
        progress = self.progress
        torch.manual_seed(step_seed(self.seed, progress.step, self.accelerator.process_index))
        self.before_step(progress.step, batch)
        lr = self.scheduler.get_last_lr()[0]
        result = take_step(
            self.model,
            self.optimizer,
            batch,
            accelerator=self.accelerator,
            max_grad_norm=self.max_grad_norm,
            average_rows=self.average_rows,
            check=lambda result: self._stop_if_diverged(result, batch),
        )
        if not result.skipped:
            self.scheduler.step()
        progress.step += 1
        progress.num_target_tokens += batch.num_target_tokens
        seconds = time.perf_counter() - started
        return StepRecord(
            step=progress.step,
            epoch=round(batch.epoch, 4),
            loss=result.loss,
            lr=float(lr),
            grad_norm=result.grad_norm,
            num_target_tokens=batch.num_target_tokens,
            num_tokens=batch.num_tokens,
            num_computed_tokens=batch.num_computed,
            tokens_per_second=batch.num_tokens / seconds,
            seconds=seconds,
        )

    def _on_any_process(self, flag: bool) -> bool:
        """Return whether `flag` is set on any process: the same answer on every process."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, reduction="sum") > 0)

    def _stop_if_diverged(self, result: StepResult, batch: StepBatch) -> None:
        # the fp16 scaler itself skips steps that overflow
        scaled = self.accelerator.scaler is not None and math.isfinite(result.loss)
        problem = self.guard.problem(result.loss, 0.0 if scaled else result.grad_norm)
        if problem is None:
            return
        kept = f"is in {self.bad_batch_path}"
        if self.accelerator.is_main_process:
            data = io.BytesIO()
            torch.save({"step": self.progress.step + 1, "micro_batches": batch.micro_batches}, data)
            try:
                write_bytes(self.bad_batch_path, data.getvalue())
            except UserError as error:
                kept = f"is lost ({error})"
        raise Diverged(
            f"training stopped at step {self.progress.step + 1}: {problem}; the batch {kept}, the "
            "checkpoints are untouched. Lower optimizer.lr, or look at that batch"
        )

    def _evaluate_if_due(self) -> bool | None:
        """Return whether this step's evaluation is the best so far, or None if none was due."""
        step = self.progress.step
        if step % self.cadence.evaluate_every and step != self.cadence.num_steps:
            return None
        self.optimizer.eval()
        value = self.evaluate(step).get(self.cadence.best)
        if value is None:
            return False
        best, sign = self.progress.best_value, 1 if self.cadence.higher_is_better else -1
        improved = best is None or sign * value > sign * best
        if improved:
            self.progress.best_value, self.progress.best_step = value, step
            self.progress.evaluations_since_best = 0
        else:
            self.progress.evaluations_since_best += 1
        return improved

    def _checkpoint_is_due(self, improved: bool | None) -> bool:
        """Return whether to save: at the end, at the best evaluation, and as the cadence says."""
        step, every = self.progress.step, self.cadence.checkpoint_every
        if step == self.cadence.num_steps or improved or self._out_of_patience():
            return True
        return improved is not None if every is None else step % every == 0

    def _out_of_patience(self) -> bool:
        return (
            self.cadence.patience is not None
            and self.progress.evaluations_since_best >= self.cadence.patience
        )

    def _save(self) -> None:
        self.optimizer.eval()
        with stored_rows(self.optimizer):
            weights = trainable_state(self.accelerator.unwrap_model(self.model))
            optimizer_state = self.optimizer.state_dict()
        self.progress.guard, scaler = self.guard.state_dict(), self.accelerator.scaler
        files = {
            "model.pt": weights,
            "optimizer.pt": optimizer_state,
            "training.pt": {
                "progress": asdict(self.progress),
                "scheduler": self.scheduler.state_dict(),
                "data": self.batches.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "identity": self.identity,
            },
        }
        if self.accelerator.is_main_process:
            self.logger.sync()  # no checkpoint is on the disk before the lines of its steps
        self.checkpoints.save(self.progress.step, files, best_step=self.progress.best_step)

    def resume(self, checkpoint: Path) -> int | None:
        """Continue from a checkpoint of the same run (see `check_identity`).

        Optimizer and schedule keep the options that they have now. If the checkpoint of the best
        evaluation so far is missing or damaged, that evaluation is forgotten, and its step is
        returned.
        """
        state, options = load(checkpoint, "training.pt"), options_of(self.optimizer)
        self.restore(checkpoint)
        schedule, base = state["scheduler"], self.scheduler.base_lrs
        lrs = [
            lr * factor(schedule["last_epoch"])
            for lr, factor in zip(base, self.scheduler.lr_lambdas, strict=True)
        ]
        self.scheduler.load_state_dict({**schedule, "base_lrs": base, "_last_lr": lrs})
        for group, own, initial, lr in zip(
            self.optimizer.param_groups, options, base, lrs, strict=True
        ):
            group.update({**own, "initial_lr": initial, "lr": lr})
        self.batches.load_state_dict(state["data"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.guard.load_state_dict(self.progress.guard)
        best = self.progress.best_step
        if best is not None and damage_of(self.checkpoints.path(best)) is not None:
            self.progress.best_step = self.progress.best_value = None
            self.progress.evaluations_since_best = 0
            return best
        return None

    def restore(self, checkpoint: Path) -> None:
        """Load the weights and the optimizer's state of a checkpoint.

        They are loaded together, since updates of rows may be deferred.
        """
        restore_checkpoint(self.accelerator.unwrap_model(self.model), self.optimizer, checkpoint)


def check_identity(checkpoint: Path, identity: Mapping[str, str]) -> None:
    """Raise UserError if the checkpoint belongs to another model, other data or another setting."""
    then = load(checkpoint, "training.pt")["identity"]
    for what, now in identity.items():
        if then.get(what) != now:
            raise UserError(
                f"{checkpoint} cannot be resumed: {what} changed (then {then.get(what)}, now "
                f"{now}). Restore it, or start a new run in another output_dir"
            )


def step_seed(seed: int, step: int, process: int) -> int:
    """Return a seed of 63 bits that differs for every step and process."""
    digest = hashlib.blake2b(f"{seed}/{step}/{process}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of the parameters that train, and of every buffer.

    Frozen weights come from the base model again.
    """
    frozen = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def restore_checkpoint(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> None:
    """Load weights and optimizer state into the model and the optimizer that they were saved from.

    Under an engine that shards, each process loads its shards. What has the shape of a parameter is
    sharded like that parameter. Raises UserError unless the checkpoint has every weight that trains
    and no other, each with its shape.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with stored_rows(optimizer):
        weights = model.state_dict()
        stored = load(checkpoint, "model.pt", own=lambda place: weights.get(place[0]))
        _check_weights(trainable_state(model), stored, checkpoint)
        # Frozen weights are those of the base model. A module may hold buffers that it has not
        # measured yet, so only the loading shows what the model does not have.
        _refuse_weights(
            "has, unlike the model,",
            model.load_state_dict(stored, strict=False).unexpected_keys,
            checkpoint,
        )
        stored = load(
            checkpoint,
            "optimizer.pt",
            own=lambda place: parameters[place[1]] if place[0] == "state" else None,
        )
        optimizer.load_state_dict(stored)


def _check_weights(wanted: Mapping[str, torch.Tensor], stored: object, checkpoint: Path) -> None:
    """Raise UserError if `stored` lacks a name or a shape of `wanted`."""
    found = stored if isinstance(stored, Mapping) else {}
    shapes = [
        name
        for name in wanted.keys() & found.keys()
        if getattr(found[name], "shape", None) != wanted[name].shape
    ]
    _refuse_weights("lacks", wanted.keys() - found.keys(), checkpoint)
    if shapes:
        name = min(shapes)
        raise UserError(
            f"in {checkpoint / 'model.pt'} {name} has another shape than "
            f"{tuple(wanted[name].shape)}, which the model needs. Take another checkpoint"
        )


def _refuse_weights(what: str, names: Collection[str], checkpoint: Path) -> None:
    if names:
        raise UserError(
            f"{checkpoint / 'model.pt'} {what} {len(names)} weights, such as {min(names)}. "
            "Take another checkpoint, or the model that it was saved from"
        )


def stored_rows(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
    """Return a context in which state dicts show the rows of a lazy table as they are stored."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.deferred() if isinstance(inner, LazyAdamW) else contextlib.nullcontext()
