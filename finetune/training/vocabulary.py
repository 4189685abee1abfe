"""The vocabulary from step to step: rows for later tokens of a stream, and frozen rows to draw."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from finetune.compute.products import release
from finetune.data.batches.collate import collate
from finetune.data.batches.steps import StepBatch
from finetune.data.encode import EncodedDataset
from finetune.data.types import MicroBatch
from finetune.models.language_model import LanguageModel
from finetune.models.vocabulary.activate import active_modules
from finetune.models.vocabulary.choice import VocabularyPlan
from finetune.models.vocabulary.frozen_sample import (
    FrozenSampler,
    inclusion_chances,
    measure_frozen_rows,
)
from finetune.models.vocabulary.rows import NO_TOKEN
from finetune.training.trainer import step_seed

MEASURED_TOKENS = 2048  # target tokens on which the model's probabilities are measured
MEASURED_AT = frozenset(16 * 4**k for k in range(16))
"""Steps before which they are measured again, after the first: they move most at the start."""


def measuring_batches(
    dataset: EncodedDataset, *, pad_id: int, size: int = 4
) -> Iterator[MicroBatch]:
    """Yield examples from all over `dataset`, up to MEASURED_TOKENS target tokens.

    A batch has `size` of them, padded.
    """
    count, order = 0, range(0, len(dataset), max(1, len(dataset) // 256))
    for start in range(0, len(order), size):
        if count >= MEASURED_TOKENS:
            return
        chosen = order[start : start + size]
        count += sum(dataset.target_counts[i] for i in chosen)
        yield collate(
            [[dataset[i]] for i in chosen], pad_id=pad_id, packed=False, pad_to_multiple_of=1
        )


class VocabularyKeeper:
    """The state of the vocabulary from step to step: prepared before each, asked for used tokens.

    `batches()` yields the data on which the model's probabilities are measured, for mode `sampled`.
    `num_steps`: of the whole run. `note` gets sentences for the user, each of them once.
    """

    def __init__(
        self,
        plan: VocabularyPlan,
        language_model: LanguageModel,
        *,
        batches: Callable[[], Iterable[MicroBatch]],
        accelerator: Accelerator,
        num_steps: int,
        seed: int,
        note: Callable[[str], None],
    ) -> None:
        self.plan, self.language_model, self.batches = plan, language_model, batches
        self.accelerator, self.num_steps, self.seed = accelerator, num_steps, seed
        self.note = note
        self.modules = active_modules(language_model)
        self.noted: set[str] = set()
        self.left: set[int] = set()  # tokens of a stream for which there was no row
        self.sampler: FrozenSampler | None = None
        self.has_chances = False
        if plan.num_sampled is not None:
            even = torch.zeros(len(self._head().frozen_ids))  # until the first step
            self.sampler = FrozenSampler(language_model, inclusion_chances(even, plan.num_sampled))

    def before_step(self, step: int, batch: StepBatch) -> None:
        """Prepare the vocabulary for `batch`, after `step` optimizer steps.

        Every process must call it, with its own share of the step.
        """
        frozen = self._grow(batch) if self.plan.spare else None
        if self.plan.spare and step + 1 == self.num_steps:
            self._note_once(self._turned_up())
        if self.sampler is not None and self.plan.num_sampled is not None:
            self._update_chances(step, self.sampler, self.plan.num_sampled)
            self.sampler.before_step(step_seed(self.seed, step, -1), frozen)

    def line(self) -> str:
        """Return the line of the plan, and what became of a stream."""
        return f"{self.plan.line()}; {self._turned_up()}" if self.plan.spare else self.plan.line()

    def _turned_up(self) -> str:
        active = self.modules[0].vocabulary.num_active
        late = ""
        if self.left:
            late = f"; {len(self.left):,} more came (since the last start) when no row was left"
        turned_up = active - len(self.plan.ids)
        return (
            f"{active:,} tokens train at the end, {turned_up:,} of which turned up in the "
            f"stream{late}"
        )

    def _update_chances(self, step: int, sampler: FrozenSampler, count: int) -> None:
        """Give the sampler chances that follow the model's probabilities, as last measured."""
        vocabulary = self._head()
        if measure := vocabulary.frozen_mass is None or step in MEASURED_AT:
            with self.accelerator.autocast():
                mass = measure_frozen_rows(self.language_model, self.batches())
            release()  # logits over the whole vocabulary; those of a step are few
            vocabulary.frozen_mass = mass.float().to(vocabulary.frozen_ids.device)
        if measure or not self.has_chances:  # a resumed run has the mass from its checkpoint
            sampler.chances = inclusion_chances(vocabulary.frozen_mass.cpu(), count)
            self.has_chances = True

    def _head(self) -> Any:
        return self.language_model.causal_lm.get_output_embeddings().vocabulary

    def inactive_tokens(self) -> torch.Tensor | None:
        """Return [V] bool, true for tokens that the run does not use, or None if it uses all.

        Their rows do not train, unless all rows do.
        """
        inactive = torch.ones(self.plan.rows, dtype=torch.bool)
        inactive[list(self.plan.used)] = False
        for module in self.modules:  # a stream's may have grown
            ids = module.vocabulary.active_ids.cpu()
            inactive[ids[ids != NO_TOKEN]] = False
        return inactive if inactive.any() else None

    def _grow(self, batch: StepBatch) -> torch.Tensor | None:
        """Give rows to the new tokens of the step, over all processes, while rows are left.

        Returns the tokens that stay frozen.
        """
        vocabulary, rows = self.modules[0].vocabulary, len(self.modules[0].weight)
        ids = torch.cat(
            [micro_batch["input_ids"].flatten() for micro_batch in batch.micro_batches]
        ).unique()
        new = ids.to(vocabulary.row_of_id.device)
        new = new[vocabulary.row_of_id[new] >= rows].tolist()
        if self.accelerator.num_processes > 1:
            new = gather_object(new)
        if not new:
            return None
        wanted = torch.tensor(sorted(set(new)), device=vocabulary.row_of_id.device)
        left = wanted
        for module in {id(module.vocabulary): module for module in self.modules}.values():
            left = module.vocabulary.grow(module.weight, wanted)
        self._note_once(
            "the stream has tokens that its first records did not have; they train from now on "
            f"(room for {self.plan.spare:,})"
        )
        if not len(left):
            return None
        self.left.update(left.tolist())
        self._note_once(
            f"all {self.plan.spare:,} spare rows are taken; later tokens are read and predicted "
            "with their frozen rows (vocabulary.keep, or vocabulary.mode=full, trains them too)"
        )
        return left

    def _note_once(self, what: str) -> None:
        if what not in self.noted:
            self.noted.add(what)
            self.note(f"vocabulary: {what}")
