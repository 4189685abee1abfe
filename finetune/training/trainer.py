"""The training loop. It uses what it is given and builds nothing.

**Randomness.** The generators are seeded from (seed, step, process) at each step. So nothing
between the steps (evaluation, generation, saving) can change the run, and a resumed run needs no
saved generator state.
"""

import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list

from finetune.data.batches.dataset import TrainingBatches
from finetune.data.batches.steps import StepBatch
from finetune.data.batches.stream import StreamingBatches
from finetune.errors import Border, UserError
from finetune.optim import go_on_with, options_of
from finetune.run.files import write_bytes
from finetune.run.folder import step_of
from finetune.run.log import MetricLogger
from finetune.run.records import StepRecord
from finetune.training.cadence import Cadence, Progress
from finetune.training.checkpoint import ANOTHER, CheckpointStore, as_written, damage_of, load
from finetune.training.clock import Clock
from finetune.training.form import check_like, in_order
from finetune.training.restore import restore_checkpoint, stored_rows, trainable_state
from finetune.training.step import StepResult, take_step
from finetune.training.stopping import Diverged, DivergenceGuard, NoBatch, StopSignal

Stopped = Literal["finished", "early stopping", "signal"]


class Trainer:
    """The training loop of a module that maps a micro-batch to the sum of its token losses in nats.

    Module and optimizer come from the engine (`finetune.distributed.engines.prepare`).
    `evaluate(step)` returns the metrics of the model as it is. `identity` is what a resumed run
    must share with this one. With a `clock` the run also ends when its time is up, and the steps of
    the schedule are the clock's ticks. `average_rows` and `before_step` are called in every step,
    the latter with the number of steps taken.
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
        clock: Clock | None = None,
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
        self.clock = clock
        self.progress = Progress()
        self._evaluated_at = 0.0  # seconds of the run's time
        self._saved_at = 0.0  # seconds of this process's clock

    def train(self, on_signal: Callable[[str], None] = lambda text: None) -> Stopped:
        """Run to the last step, an early stop, or a signal. Each leaves a complete checkpoint.

        `on_signal` gets a line for the user when a signal comes, within its handler.

        Raises Diverged on a NaN or diverging loss, after saving the batch. Raises NoBatch if a
        stream cannot be read further, after saving what was trained. Raises UserError if a
        checkpoint cannot be written.
        """
        steps = iter(self.batches)
        self._saved_at = time.monotonic()
        if self.clock is not None:
            self.clock.start(self.progress.seconds)
            self._evaluated_at = self.progress.seconds
        if owed := self.progress.owed:  # a signal may end this at once: nothing is lost
            self._evaluate()
        with StopSignal(on_signal) as signal:
            if owed:
                self._save()
            while not self._is_over():
                if self._out_of_patience():  # also at once, if a stopped run is resumed
                    return "early stopping"
                record = self._step(self._next(steps))
                signalled, is_late = self.on_any_process(signal.received, self._is_late())
                if self.accelerator.is_main_process:
                    self.logger.log(record)
                improved: bool | None = None
                is_due = self._evaluation_is_due()
                if is_due and signalled:  # it may take longer than the process has
                    self.progress.owed = True
                elif is_due:
                    improved = self._evaluate()
                    (signalled,) = self.on_any_process(signal.received)
                if signalled or is_late or self._checkpoint_is_due(improved):
                    self._save()
                if signalled:
                    return "signal"
        return "early stopping" if self._out_of_patience() else "finished"

    def _next(self, steps: Iterator[StepBatch]) -> StepBatch:
        """Return the next batch. If no process can read it, first save what was trained."""
        if not isinstance(self.batches, StreamingBatches):  # it was read at the start
            return next(steps)
        try:
            batch: StepBatch | UserError = next(steps)
        except UserError as error:  # such as a bad record
            batch = error
        failed = isinstance(batch, UserError)
        on_one, but_not_all = self.on_any_process(failed, not failed)
        if on_one and not but_not_all and self.progress.step not in (0, *self.checkpoints.steps()):
            self._save()
        if isinstance(batch, UserError):
            raise NoBatch(str(batch)) from batch
        return batch

    def _step(self, batch: StepBatch) -> StepRecord:
        started = time.perf_counter()
        progress = self.progress
        torch.manual_seed(step_seed(self.seed, progress.step, self.accelerator.process_index))
        self.before_step(progress.step, batch)
        schedule = self.scheduler  # of the run's own rate, whatever the groups have
        lr = self.optimizer.defaults["lr"] * schedule.lr_lambdas[0](schedule.last_epoch)
        result = take_step(
            self.model,
            self.optimizer,
            batch,
            accelerator=self.accelerator,
            max_grad_norm=self.max_grad_norm,
            average_rows=self.average_rows,
            check=lambda result: self._stop_if_diverged(result, batch),
        )
        progress.step += 1
        if self.clock is not None:
            progress.seconds = self.clock.read()
            self._follow(self.clock)
        elif not result.skipped:
            self.scheduler.step()
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

    def _is_over(self) -> bool:
        """Return whether the last step was taken: by their number, or because the time is up."""
        return self._time_is_up() or self.progress.step >= self.cadence.num_steps

    def _time_is_up(self) -> bool:
        return self.clock is not None and self.progress.seconds >= self.clock.limit

    def _follow(self, clock: Clock) -> None:
        """Bring the learning rate to where the run is, by time or by steps, whichever is more."""
        progress = self.progress
        share = max(progress.seconds / clock.limit, progress.step / self.cadence.num_steps)
        clock.move(self.scheduler, share)

    def on_any_process(self, *flags: bool) -> list[bool]:
        """Return whether each flag is set on any process: the same answer on every process."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(counts, reduction="sum").tolist()]

    def _stop_if_diverged(self, result: StepResult, batch: StepBatch) -> None:
        # the fp16 scaler itself skips steps that overflow
        scaled = self.accelerator.scaler is not None and math.isfinite(result.loss)
        norm = 0.0 if scaled else result.grad_norm
        problem = self.guard.problem(result.loss, norm, batch.num_target_tokens)
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

    def evaluate_end(self, known: Mapping[str, float] | None) -> None:
        """Let the weights of a run that is over at its start be the best, if they are.

        A run that is resumed with fewer steps or less time may be over where it was stopped, and
        then nobody has evaluated it. `known`: what process 0 knows of an evaluation at this step.
        """
        if self.accelerator.num_processes > 1:
            known = broadcast_object_list([known])[0]
        if known is None:
            self.optimizer.eval()
            known = self.evaluate(self.progress.step)
        value = known.get(self.cadence.best)
        if value is not None and self._is_better(value := float(value)):  # NaN is text in a file
            self.progress.best_value, self.progress.best_step = value, self.progress.step

    def _evaluation_is_due(self) -> bool:
        progress, after = self.progress, self.cadence.evaluate_after
        if self._is_over() or progress.step % self.cadence.evaluate_every == 0:
            return True
        return after is not None and progress.seconds - self._evaluated_at >= after

    def _evaluate(self) -> bool:
        """Return whether the evaluation of this step is the best so far."""
        step = self.progress.step
        self.progress.owed = False
        self.optimizer.eval()
        value = self.evaluate(step).get(self.cadence.best)
        if self.clock is not None and self.cadence.evaluate_after is not None:
            self._evaluated_at = self.clock.read()  # so that a slow one does not follow another
        if value is None:
            return False
        improved = self._is_better(value)
        if improved:
            self.progress.best_value, self.progress.best_step = value, step
            self.progress.evaluations_since_best = 0
        else:
            self.progress.evaluations_since_best += 1
        return improved

    def _is_better(self, value: float) -> bool:
        """Return whether `value` is better than the best evaluation so far, as NaN never is."""
        best, sign = self.progress.best_value, 1 if self.cadence.higher_is_better else -1
        if best is None or math.isnan(best):
            return not math.isnan(value)
        return sign * value > sign * best

    def _checkpoint_is_due(self, improved: bool | None) -> bool:
        """Return whether to save: at the end, at the best evaluation, and as the cadence says."""
        step, every = self.progress.step, self.cadence.checkpoint_every
        if self._is_over() or improved or self._out_of_patience():
            return True
        return improved is not None if every is None else step % every == 0

    def _is_late(self) -> bool:
        """Return whether the last checkpoint is older than a run may lose, on this process."""
        after = self.cadence.checkpoint_after
        return self.cadence.checkpoint_every is None and time.monotonic() - self._saved_at >= after

    def why_over(self) -> str | None:
        """Return why there is no step to take; None if there is one."""
        if self.progress.step >= self.cadence.num_steps:
            return f"all {self.cadence.num_steps:,} steps are taken (training.max_steps)"
        if self._time_is_up():
            return "its time is used (training.max_time)"
        if self._out_of_patience():
            return "it stopped early (evaluation.early_stopping_patience)"
        return None

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
            "optimizer.pt": in_order(optimizer_state),
            "training.pt": {
                "progress": asdict(self.progress),
                "scheduler": self.scheduler.state_dict(),
                "data": self.batches.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "identity": {**self.identity, "judged by": self.cadence.judged_by},
            },
        }
        if self.accelerator.is_main_process:
            self.logger.sync()  # no checkpoint is on the disk before the lines of its steps
        self.checkpoints.save(self.progress.step, files, best_step=self.progress.best_step)
        self._saved_at = time.monotonic()

    def resume(self, checkpoint: Path) -> str | None:
        """Continue from a checkpoint of the same run (see `checkpoint.check_identity`).

        Optimizer and schedule keep the options that they have now. The best evaluation so far is
        forgotten if it does not compare, or if its checkpoint is missing or damaged. Returns a
        sentence about that. A run that stopped early is over all the same.
        """
        state, options = self._training_state(checkpoint), options_of(self.optimizer)
        self.restore(checkpoint)
        progress = Progress(**state["progress"])
        schedule, base = state["scheduler"], self.scheduler.base_lrs
        if self.clock is None and progress.seconds:  # its place was a time, and is now a step
            schedule = {**schedule, "last_epoch": progress.step}
            progress.seconds = 0.0
        lrs = [
            lr * factor(schedule["last_epoch"])
            for lr, factor in zip(base, self.scheduler.lr_lambdas, strict=True)
        ]
        with Border(f"{checkpoint / 'training.pt'} does not fit", do=ANOTHER):
            self.scheduler.load_state_dict({**schedule, "base_lrs": base, "_last_lr": lrs})
        go_on_with(self.optimizer, options)
        for group, initial, lr in zip(self.optimizer.param_groups, base, lrs, strict=True):
            group.update({"initial_lr": initial, "lr": lr})
        self.batches.load_state_dict(state["data"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = progress
        self.guard.load_state_dict(self.progress.guard)
        if self.clock is not None:
            self._follow(self.clock)
        best, judged_by = self.progress.best_step, self.cadence.judged_by
        why = None
        if best is not None and state["identity"].get("judged by", judged_by) != judged_by:
            why = f"the best evaluation, of step {best}, was by another measure or on other data"
        elif best is not None and damage_of(place := self.checkpoints.path(best)) is not None:
            why = f"{place}, the best checkpoint so far, is missing or damaged"
        if why is not None:
            self.progress.best_step = self.progress.best_value = None
        return why and f"{why}, and is not counted"

    def _training_state(self, checkpoint: Path) -> dict[str, Any]:
        """Return what training.pt holds. Raises UserError if it has not the form of ours."""
        state, where = load(checkpoint, "training.pt"), checkpoint / "training.pt"
        scaler = self.accelerator.scaler
        kept = state.get("scheduler") if isinstance(state, Mapping) else None
        needed = {"last_epoch", "lr_lambdas", *(kept if isinstance(kept, Mapping) else ())}
        schedule = {k: v for k, v in self.scheduler.state_dict().items() if k in needed}
        progress = asdict(self.progress) | {"guard": None}
        theirs = state.get("progress") if isinstance(state, Mapping) else None
        if isinstance(theirs, Mapping) and "owed" not in theirs:  # of an earlier version
            del progress["owed"]
        ours = {
            "progress": progress,
            "scheduler": schedule | {"lr_lambdas": None},
            "data": self.batches.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "identity": None,
        }
        with as_written(where):
            check_like(state, ours, "it")
            check_like(state["progress"]["guard"], self.guard.state_dict(), "progress.guard")
            if state["progress"]["step"] != step_of(checkpoint):
                raise TypeError(f"it is of step {state['progress']['step']}")
            return dict(state)

    def restore(self, checkpoint: Path) -> None:
        """Load the weights and the optimizer's state of a checkpoint.

        They are loaded together, since updates of rows may be deferred.
        """
        restore_checkpoint(self.accelerator.unwrap_model(self.model), self.optimizer, checkpoint)


def step_seed(seed: int, step: int, process: int) -> int:
    """Return a seed of 63 bits that differs for every step and process."""
    digest = hashlib.blake2b(f"{seed}/{step}/{process}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
