"""The batches of a dataset that is held in memory, for training and for evaluation.

Training batches come in an order that can be resumed at any step. There are no workers and no
look-ahead: collating a batch takes well under a millisecond. So the place in the data that
`state_dict` returns is always the one after the last step taken.
"""

from collections.abc import Iterator
from typing import Any

from finetune.data.batches.collate import collate
from finetune.data.batches.packing import pack
from finetune.data.batches.steps import (
    BatchShape,
    StepBatch,
    lay_out,
    plan_epoch,
    plan_step_trees,
)
from finetune.data.batches.trees import (
    LEAST_SAVED,
    collate_trees,
    count_tokens,
    leaves,
    plan_trees,
)
from finetune.data.encode import EncodedDataset
from finetune.data.types import MicroBatch
from finetune.errors import UserError


class TrainingBatches:
    """The optimizer steps of each epoch for one process; see `finetune.data.batches.steps`."""

    def __init__(self, dataset: EncodedDataset, shape: BatchShape, *, max_length: int) -> None:
        self.dataset = dataset
        self.shape = shape
        self.max_length = max_length
        self._lengths = dataset.lengths
        self._place = (0, 0)
        self.num_sequences = len(self._plan(0))  # the same in every epoch: only lengths decide
        self.steps_per_epoch = -(-self.num_sequences // shape.batch_size)
        self.fingerprint = dataset.fingerprint

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, step within it) of the next step."""
        return self._place

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps from `place` on, epoch after epoch, without end."""
        while True:
            yield from self.epoch(*self._place)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """Yield the steps of one epoch from `start_step` on."""
        sequences, size = self._plan(epoch), self.shape.batch_size
        for step in range(start_step, self.steps_per_epoch):
            self._place = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield self._step(sequences[step * size : (step + 1) * size], epoch, step)

    def count_shared(self, most: int) -> tuple[int, int]:
        """Return the tokens of the first epoch, and how many of them trees compute.

        At most `most` steps are looked at, spread over the epoch.
        """
        sequences, size = self._plan(0), self.shape.batch_size
        tokens = computed = 0
        for step in range(0, self.steps_per_epoch, -(-self.steps_per_epoch // most)):
            own = sequences[step * size : (step + 1) * size]
            examples = [self.dataset[i] for sequence in own for i in sequence]
            forests = plan_step_trees(examples, len(own), self.shape, max_length=self.max_length)
            count = sum(map(len, examples))
            tokens += count
            computed += count if forests is None else sum(map(count_tokens, forests))
        return tokens, computed

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data after the last step yielded, and the data's fingerprint."""
        return {"epoch": self._place[0], "step": self._place[1], "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the place in `state` from the next iteration on.

        Raises UserError if the data has changed.
        """
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                "the training data is not the one that this run began with (or its format, "
                "tokenizer or max_length changed), so the run cannot be resumed. Restore the data, "
                "or start a new run in another output_dir"
            )
        if state["step"] >= self.steps_per_epoch:
            raise UserError(
                f"a pass over the training data has {self.steps_per_epoch} steps, and the "
                f"checkpoint was taken after {state['step']} of one. Take another checkpoint"
            )
        self._place = (state["epoch"], state["step"])

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(self._lengths, self.shape, max_length=self.max_length, epoch=epoch)

    def _step(self, sequences: list[list[int]], epoch: int, step: int) -> StepBatch:
        numbers = [i for sequence in sequences for i in sequence]
        examples = {i: self.dataset[i] for i in numbers}
        micro_batches, example_ids, num_computed = lay_out(
            sequences, examples, self.shape, max_length=self.max_length
        )
        return StepBatch(
            micro_batches=micro_batches,
            num_target_tokens=sum(self.dataset.target_counts[i] for i in numbers),
            num_tokens=sum(self._lengths[i] for i in numbers),
            num_computed=num_computed,
            epoch=epoch + (step + 1) / self.steps_per_epoch,
            example_ids=example_ids,
        )


class EvaluationBatches:
    """Every example once in a fixed order, the longest first.

    A batch holds `batch_size` sequences, and the processes take batches in turn. All processes have
    equally many batches. The last ones may be empty, which is one sequence of padding. With `share`
    packed batches are trees of as many tokens (`trees`), if that saves LEAST_SAVED of them.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        *,
        max_length: int,
        packing: bool,
        batch_size: int,
        pad_id: int,
        rank: int = 0,
        num_processes: int = 1,
        share: bool = False,
    ) -> None:
        self.dataset = dataset
        self.max_length = max_length
        self.packing = packing
        self.pad_id = pad_id
        lengths = dataset.lengths
        sequences = pack(lengths, max_length) if packing else [[i] for i in range(len(lengths))]
        sequences.sort(key=lambda sequence: sum(lengths[i] for i in sequence), reverse=True)
        batches = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
        batches += [[] for _ in range(-len(batches) % num_processes)]
        self.example_ids = batches[rank::num_processes]
        self.forests = None
        if share and packing:
            forests = plan_trees(
                dataset, capacity=batch_size * max_length, num_processes=num_processes
            )
            computed = sum(map(count_tokens, forests or []))
            if forests is not None and computed <= (1 - LEAST_SAVED) * sum(lengths):
                forests.sort(key=count_tokens, reverse=True)
                self.forests = forests[rank::num_processes]
                self.example_ids = [[leaves(forest)] for forest in self.forests]

    def __len__(self) -> int:
        return len(self.example_ids)

    def __iter__(self) -> Iterator[MicroBatch]:
        for forest in self.forests or ():
            yield collate_trees(forest, self.dataset, pad_id=self.pad_id)
        for sequences in self.example_ids if self.forests is None else ():
            yield collate(
                [[self.dataset[i] for i in sequence] for sequence in sequences],
                pad_id=self.pad_id,
                packed=self.packing,
                max_length=self.max_length,
            )
