"""The batches of a dataset that is held in memory: for training, in an order that can be resumed at any step, and for evaluation.

Floor 2. No workers and no look-ahead: a batch costs well under a millisecond to collate, and the place in the data that
`state_dict` tells is always the one after the step last handed out.
"""

from collections.abc import Iterator
from typing import Any

from finetune.data.batches.collate import collate
from finetune.data.batches.packing import pack
from finetune.data.batches.steps import Rows, StepBatch, plan_epoch, share
from finetune.data.encode import EncodedDataset
from finetune.data.types import Batch
from finetune.errors import UserError

__all__ = ["EvaluationBatches", "StepBatch", "TrainingBatches"]


class TrainingBatches:
    """The optimizer steps of each epoch for one process; see `finetune.data.batches.steps` for how they are planned.

    `batch_size`: rows per optimizer step over all processes; `micro_batch_size`: rows per forward.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        *,
        max_length: int,
        packing: bool,
        batch_size: int,
        micro_batch_size: int,
        pad_id: int,
        seed: int,
        rank: int,
        num_processes: int,
    ) -> None:
        self.dataset = dataset
        self.max_length = max_length
        self.packing = packing
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes
        self._lengths = dataset.lengths
        self._place = (0, 0)
        self.num_rows = len(
            self._plan(0)
        )  # the same in every epoch: it depends on the lengths alone
        self.steps_per_epoch = -(-self.num_rows // batch_size)
        self.fingerprint = dataset.fingerprint

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, step within it) of the next step."""
        return self._place

    def __iter__(self) -> Iterator[StepBatch]:
        """The steps from `place` on, epoch after epoch, without end."""
        while True:
            yield from self.epoch(*self._place)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """The steps of one epoch from `start_step` on."""
        rows = self._plan(epoch)
        for step in range(start_step, self.steps_per_epoch):
            self._place = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield self._step(
                rows[step * self.batch_size : (step + 1) * self.batch_size], epoch, step
            )

    def state_dict(self) -> dict[str, Any]:
        """The place in the data after the step last yielded, and what the data was."""
        return {"epoch": self._place[0], "step": self._place[1], "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `place`; iterate to go on from it. Raises UserError where the data is not what it was."""
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                "the training data is not the one that this run began with (or its format, tokenizer or max_length changed), so "
                "the run cannot be resumed; restore the data, or start a new run in another output_dir"
            )
        self._place = (state["epoch"], state["step"])

    def _plan(self, epoch: int) -> Rows:
        return plan_epoch(
            self._lengths,
            max_length=self.max_length,
            packing=self.packing,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=epoch,
        )

    def _step(self, rows: Rows, epoch: int, step: int) -> StepBatch:
        parts = share(
            len(rows),
            micro_batch_size=self.micro_batch_size,
            rank=self.rank,
            num_processes=self.num_processes,
        )
        example_ids = [[rows[i] for i in part] for part in parts]
        examples = [i for row in rows for i in row]
        return StepBatch(
            micro_batches=[self._collate(part) for part in example_ids],
            num_target_tokens=sum(self.dataset.target_counts[i] for i in examples),
            num_tokens=sum(self._lengths[i] for i in examples),
            epoch=epoch + (step + 1) / self.steps_per_epoch,
            example_ids=example_ids,
        )

    def _collate(self, rows: Rows) -> Batch:
        return collate(
            [[self.dataset[i] for i in row] for row in rows],
            pad_id=self.pad_id,
            packed=self.packing,
            max_length=self.max_length,
        )


class EvaluationBatches:
    """Every example once, in a fixed order, the longest first, `batch_size` rows at a time; the processes take batches in turn.

    All processes have the same number of batches, the last ones perhaps empty (one padding token, no target).
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        *,
        max_length: int,
        packing: bool,
        batch_size: int,
        pad_id: int,
        rank: int,
        num_processes: int,
    ) -> None:
        self.dataset = dataset
        self.max_length = max_length
        self.packing = packing
        self.pad_id = pad_id
        lengths = dataset.lengths
        rows = pack(lengths, max_length) if packing else [[i] for i in range(len(lengths))]
        rows.sort(key=lambda row: sum(lengths[i] for i in row), reverse=True)
        parts = share_batches(rows, batch_size=batch_size, num_processes=num_processes)
        self.example_ids = parts[rank::num_processes]

    def __len__(self) -> int:
        return len(self.example_ids)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.example_ids:
            yield collate(
                [[self.dataset[i] for i in row] for row in rows],
                pad_id=self.pad_id,
                packed=self.packing,
                max_length=self.max_length,
            )


def share_batches(rows: Rows, *, batch_size: int, num_processes: int) -> list[Rows]:
    """Batches of rows, filled up with empty ones to a multiple of the number of processes."""
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return batches + [[] for _ in range(-len(batches) % num_processes)]
