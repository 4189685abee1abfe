"""The training loop. It uses what it is given and builds nothing.

Floor 4.

**Loss.** Every target token weighs the same however a step is cut: the sum of the token losses of each micro-batch is divided by
the number of target tokens of the whole step, over all micro-batches and processes. Data-parallel engines average gradients over
processes, hence the factor `num_processes`. So 1 x 8 = 8 x 1 = 2 x 4 rows, on one process or on many.

**Randomness.** The generators are seeded from (seed, step, process) at each step. Nothing that happens between steps (evaluation,
generation, saving) can change the run, and a resumed run needs no saved generator state.
"""

import contextlib
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from finetune.checkpoint import CheckpointStore, is_complete, load
from finetune.data.loader import StepBatch, TrainingBatches
from finetune.data.stream import StreamingBatches
from finetune.divergence import Diverged, DivergenceGuard
from finetune.errors import UserError
from finetune.optim import LazyAdamW, clip_grad_norm_, options_of
from finetune.stopping import StopSignal
from finetune.tracking import MetricLogger

Stopped = Literal["finished", "early stopping", "signal"]


@dataclass
class Progress:
    """Where the run is: what a checkpoint stores beside weights, optimizer and data."""

    step: int = 0  # optimizer steps taken
    num_target_tokens: int = 0  # seen so far
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    guard: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cadence:
    """How long the run is and what happens when, in optimizer steps."""

    num_steps: int
    evaluate_every: int
    checkpoint_every: int | None  # None: at each evaluation
    best: str  # the evaluation's key that the best checkpoint goes by
    higher_is_better: bool
    patience: int | None  # evaluations without improvement after which the run ends


class Trainer:
    """Trains a module that maps a batch to the sum of its token losses (nats)."""

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
        self.accelerator, self.model, self.optimizer, self.scheduler = (
            accelerator,
            model,
            optimizer,
            scheduler,
        )
        self.batches, self.evaluate, self.cadence = batches, evaluate, cadence
        self.checkpoints, self.logger, self.guard = checkpoints, logger, guard
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.identity, self.bad_batch_path, self.before_step = (
            dict(identity),
            bad_batch_path,
            before_step,
        )
        self.average_rows = (
            average_rows  # row-sparse gradients, over the processes: see finetune.distributed
        )
        self.progress = Progress()

    def train(self) -> Stopped:
        """Run to the last step, an early stop, or a signal; every end leaves a complete checkpoint.

        Raises Diverged on a NaN or diverging loss (the batch is saved), UserError where a checkpoint cannot be written.
        """
        steps = iter(self.batches)
        with StopSignal() as signal:
            while self.progress.step < self.cadence.num_steps:
                record, signalled = self._step(next(steps), stop=signal.received)
                if self.accelerator.is_main_process:
                    self.logger.log(record)
                improved = self._evaluate_if_due()
                if signalled or self._checkpoint_is_due(improved):
                    self._save()
                if signalled:
                    return "signal"
                if self._out_of_patience():
                    return "early stopping"
        return "finished"

    def _step(self, batch: StepBatch, *, stop: bool) -> tuple[dict[str, Any], bool]:
        started = time.perf_counter()
        torch.manual_seed(step_seed(self.seed, self.progress.step, self.accelerator.process_index))
        self.before_step(self.progress.step, batch)
        self.model.train()
        self.optimizer.train()  # for optimizers that train at one point and are read at another (schedule-free)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        scale = self.accelerator.num_processes / batch.num_target_tokens
        for last, micro_batch in _mark_last(batch.micro_batches):
            on_device = {
                key: value.to(self.accelerator.device, non_blocking=True)
                for key, value in micro_batch.items()
            }
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.model(**on_device)
                self.accelerator.backward(loss * scale)
            loss_sum += loss.detach()
        self.average_rows()
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = clip_grad_norm_(self.model.parameters(), self.max_grad_norm or math.inf)
        loss_mean, signalled = self._agree(
            loss_sum, batch.num_target_tokens, stop
        )  # waits for the GPU
        grad_norm = float(norm)
        self._stop_if_diverged(loss_mean, grad_norm, batch)
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        if not getattr(self.optimizer, "step_was_skipped", False):
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.progress.num_target_tokens += batch.num_target_tokens
        seconds = time.perf_counter() - started
        record = {
            "step": self.progress.step,
            "epoch": round(batch.epoch, 4),
            "loss": loss_mean,
            "lr": lr,
            "grad_norm": grad_norm,
            "num_target_tokens": batch.num_target_tokens,
            "num_tokens": batch.num_tokens,
            "tokens_per_second": batch.num_tokens / seconds,
            "seconds": seconds,
        }
        return record, signalled

    def _agree(
        self, loss_sum: torch.Tensor, num_target_tokens: int, stop: bool
    ) -> tuple[float, bool]:
        """The step's mean loss, and whether any process was told to stop: the same answer on every process."""
        shared = torch.stack(
            [loss_sum, torch.tensor(float(stop), dtype=torch.float64, device=loss_sum.device)]
        )
        total, stops = self.accelerator.reduce(shared, reduction="sum").tolist()
        return total / num_target_tokens, stops > 0

    def _stop_if_diverged(self, loss: float, grad_norm: float, batch: StepBatch) -> None:
        scaled = self.accelerator.scaler is not None and math.isfinite(loss)
        problem = self.guard.problem(
            loss, 0.0 if scaled else grad_norm
        )  # the fp16 scaler itself skips overflowing steps
        if problem is None:
            return
        kept = f"is in {self.bad_batch_path}"
        if self.accelerator.is_main_process:
            data = io.BytesIO()
            torch.save({"step": self.progress.step + 1, "micro_batches": batch.micro_batches}, data)
            try:
                self.bad_batch_path.parent.mkdir(parents=True, exist_ok=True)
                self.bad_batch_path.write_bytes(data.getvalue())
            except OSError as error:
                kept = f"could not be written to {self.bad_batch_path} ({error.strerror})"
        raise Diverged(
            f"training stopped at step {self.progress.step + 1}: {problem}; the batch {kept}, the "
            f"checkpoints are untouched; lower optimizer.lr, or look at that batch"
        )

    def _evaluate_if_due(self) -> bool | None:
        """Whether the evaluation of this step was the best so far; None where none was due."""
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
            (
                self.progress.best_value,
                self.progress.best_step,
                self.progress.evaluations_since_best,
            ) = value, step, 0
        else:
            self.progress.evaluations_since_best += 1
        return improved

    def _checkpoint_is_due(self, improved: bool | None) -> bool:
        """At the steps asked for, at the best evaluation and at the end; where none are asked for, at each evaluation."""
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
        self.progress.guard = self.guard.state_dict()
        files = {
            "model.pt": weights,
            "optimizer.pt": optimizer_state,
            "training.pt": {
                "progress": asdict(self.progress),
                "scheduler": self.scheduler.state_dict(),
                "data": self.batches.state_dict(),
                "scaler": self.accelerator.scaler.state_dict()
                if self.accelerator.scaler is not None
                else None,
                "identity": self.identity,
            },
        }
        self.checkpoints.save(self.progress.step, files, best_step=self.progress.best_step)

    def resume(self, checkpoint: Path) -> int | None:
        """Go on from a checkpoint of the same run (see `check_identity`), with this run's options of optimizer and schedule.

        Where the checkpoint of the best evaluation so far is not in the store, that evaluation is forgotten; returns its step.
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
        if best is not None and not is_complete(self.checkpoints.path(best)):
            (
                self.progress.best_step,
                self.progress.best_value,
                self.progress.evaluations_since_best,
            ) = None, None, 0
            return best
        return None

    def restore(self, checkpoint: Path) -> None:
        """Put the weights and the optimizer's state back to those of a checkpoint; together, since rows may be deferred."""
        restore(self.accelerator.unwrap_model(self.model), self.optimizer, checkpoint)


def check_identity(checkpoint: Path, identity: Mapping[str, str]) -> None:
    """Raise UserError where the checkpoint belongs to another model, other data, or another batch size."""
    then = load(checkpoint, "training.pt")["identity"]
    for what, now in identity.items():
        if then.get(what) != now:
            raise UserError(
                f"{checkpoint} cannot be resumed: {what} changed (then {then.get(what)}, now {now}); "
                f"restore it, or start a new run in another output_dir"
            )


def step_seed(seed: int, step: int, process: int) -> int:
    """A seed of 63 bits that differs for every step and process."""
    digest = hashlib.blake2b(f"{seed}/{step}/{process}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of the parameters that train, and of every buffer; frozen weights come back from the base model."""
    frozen = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Load weights and optimizer state of a checkpoint into the model and the optimizer that they were taken from.

    Under an engine that shards, each process puts in its shards: what has a parameter's shape is sharded as that is.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with stored_rows(optimizer):
        weights = model.state_dict()
        stored = load(checkpoint, "model.pt", own=lambda place: weights.get(place[0]))
        unexpected = model.load_state_dict(stored, strict=False).unexpected_keys
        assert not unexpected, unexpected
        stored = load(
            checkpoint,
            "optimizer.pt",
            own=lambda place: parameters[place[1]] if place[0] == "state" else None,
        )
        optimizer.load_state_dict(stored)


def stored_rows(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
    """Within it the state dicts of model and optimizer show the rows of a lazy table as they are stored, not as they are read."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.deferred() if isinstance(inner, LazyAdamW) else contextlib.nullcontext()


def _mark_last(items: list[Any]) -> Iterator[tuple[bool, Any]]:
    return ((index == len(items) - 1, item) for index, item in enumerate(items))
