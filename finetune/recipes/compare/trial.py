"""One run of a comparison: trained in its own folder and measured; its weights are deleted.

A run that was stopped goes on from its last checkpoint. A finished run is read, and not run again.
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.comparison.frequency import BINS, bins_of
from finetune.config import RunConfig
from finetune.data.batches.dataset import TrainingBatches
from finetune.data.types import IGNORE_INDEX
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import inner_model, tensor_bytes, token_tables
from finetune.optim import optimizer_info
from finetune.recipes.build.data import open_records
from finetune.recipes.build.evaluator import evaluator_of
from finetune.recipes.build.optimizer import optimizer_options
from finetune.recipes.build.parts import Parts
from finetune.recipes.train.finish import LiveRun
from finetune.recipes.train.train import run_training
from finetune.run.folder import RunDir, remove_checkpoints
from finetune.run.log import Listener
from finetune.run.records import Evaluation, StepRecord
from finetune.run.trials import Phase, Result, Run, keep_update, read_trial
from finetune.run.wording import clock
from finetune.training.stopping import Diverged
from finetune.training.trainer import Stopped

UPDATE_POINTS = 20  # steps of a run at which the update is measured against the weights


@dataclass
class Tally:
    """How many runs of a comparison or a search are done, of about how many."""

    total: int  # grows if a grid is widened
    done: set[Path] = field(default_factory=set)  # the folders of those that are over
    seconds: list[float] = field(default_factory=list)  # of each run that was trained now

    def label(self, config: RunConfig) -> str:
        """Return what the progress of the next run is called."""
        number = len(self.done) + 1
        self.total = max(self.total, number)
        section = config.optimizer
        text = f"run {number} of about {self.total}: {section.name} lr {section.lr:g}"
        if not self.seconds:
            return text
        left = sum(self.seconds) / len(self.seconds) * (self.total - len(self.done))
        return f"{text}, all runs about {clock(left)} left;"


def run_trial(config: RunConfig, *, phase: Phase, display: Display, tally: Tally) -> Run | None:
    """Train as `config` says, unless that was done before; return None if a signal stopped it.

    A reported run is also measured on data.test. A run that diverged is not measured.
    """
    folder = config.output_dir
    run = RunDir(folder)
    if (done := read_trial(folder)) is not None:
        _delete_weights(run)
        tally.done.add(folder)
        return done
    started = time.monotonic()
    name = config.optimizer.name
    watch = RunWatch(folder, test=phase == "reported")
    problem = ""
    steps = config.training.max_steps or 1
    with display.steps(steps, 0, label=tally.label(config)) as show:
        watch.show = show
        try:
            stopped = run_training(
                config,
                resume="auto",
                display=Display(enabled=False),
                listener=watch.listen,
                on_start=watch.start,
                finish=watch.finish,
            )
            if stopped == "signal":
                return None
        except Diverged as error:
            problem = str(error)
        except KeyboardInterrupt:  # before or after the steps, which handle it themselves
            return None
    settings = {**optimizer_info(name).options, **optimizer_options(config)}
    settings = json.loads(
        json.dumps(
            {key: value for key, value in settings.items() if key != "embeddings"}, default=str
        )
    )
    measured = {} if problem else watch.measured
    Result(name, phase, config.seed, settings, problem, watch.began_with, **measured).write(run)
    _delete_weights(run)
    tally.done.add(folder)
    tally.seconds.append(time.monotonic() - started)
    return read_trial(folder)


def _delete_weights(run: RunDir) -> None:
    """Delete what a trial that is over needs no more. Raises UserError if the disk refuses."""
    try:
        remove_checkpoints(run.checkpoints)
        run.bad_batch.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"the checkpoints of {run.root} could not be deleted: {error.strerror or error}"
        ) from error


class RunWatch:
    """The measurements of a run: its start, the size of its updates, the test loss and the state.

    Updates are measured outside of the token tables. In those a lazy optimizer moves a row when it
    is next used, not at the step.
    """

    def __init__(self, folder: Path, *, test: bool) -> None:
        self.show: Listener = lambda record: None
        self.began_with: dict[str, str] = {}
        self.measured: dict[str, Any] = {}
        self._run, self._test = RunDir(folder), test
        self._weights: list[torch.Tensor] = []
        self._before: list[torch.Tensor] | None = None

    def start(self, live: LiveRun) -> None:
        """Keep what the run began with."""
        parts = live.parts
        self.began_with = {key: parts.identity[key] for key in ("the model", "the training data")}
        tables = token_tables(inner_model(parts.model))
        trained = [weight for weight in parts.model.parameters() if weight.requires_grad]
        self._weights = [
            weight for weight in trained if not any(weight is table for table in tables)
        ]
        self._every = max(1, math.ceil(parts.num_steps / UPDATE_POINTS))
        self._before = self._copy()

    def listen(self, record: StepRecord | Evaluation) -> None:
        """Show a step. Measure its update if it is one of the UPDATE_POINTS steps."""
        if isinstance(record, Evaluation):
            return
        self.show(record)
        step = record.step
        if self._before is not None and (step - 1) % self._every == 0 and self._weights:
            moved = _norm(now - then for now, then in zip(self._weights, self._before))
            keep_update(self._run, step, moved / _norm(self._before))
        self._before = self._copy() if step % self._every == 0 else None

    def finish(self, live: LiveRun, stopped: Stopped) -> None:
        """Measure the optimizer's state, and the test loss if it is asked for."""
        states = live.trainer.optimizer.state.values()
        values = [value for state in states for value in state.values()]
        self.measured = {
            "state_bytes": tensor_bytes(
                value for value in values if isinstance(value, torch.Tensor)
            )
        }
        if self._test:
            self.measured |= _test_losses(live.parts)

    def _copy(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self._weights]


@torch.no_grad()
def _norm(tensors: Iterable[torch.Tensor]) -> float:
    """Return the norm of all tensors together."""
    return math.sqrt(sum(float(tensor.detach().float().square().sum()) for tensor in tensors))


def _test_losses(parts: Parts) -> dict[str, Any]:
    """Return the loss on data.test, over all target tokens and by their frequency in training."""
    config = parts.config
    assert config.data.test is not None
    bins = bins_of(_target_counts(parts, parts.material.table_rows))
    dataset = parts.material.encode(open_records(config.data.test, config.data))
    result = evaluator_of(parts).loss(dataset, groups=bins)
    found = dict(zip(BINS, result.by_group))
    sizes = torch.bincount(bins, minlength=len(BINS)).tolist()
    losses = {
        name: group.nats / group.num_target_tokens
        for name, group in found.items()
        if group.num_target_tokens
    }
    return {
        "test": {"all": result.loss, **losses},
        "bins": {
            name: {
                "tokens": sizes[i],
                "targets": found[name].num_target_tokens if name in found else 0,
            }
            for i, name in enumerate(BINS)
        },
    }


def _target_counts(parts: Parts, size: int) -> torch.Tensor:
    """Return how often each token is a target of the training data, [V]."""
    assert isinstance(parts.batches, TrainingBatches), "a comparison does not stream"
    labels = [
        label
        for example in parts.batches.dataset
        for label in example.labels
        if label != IGNORE_INDEX
    ]
    return torch.bincount(torch.tensor(labels), minlength=size)
