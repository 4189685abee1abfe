"""The vocabulary between the steps of a run: tokens that turn up in a stream, frozen rows that are drawn."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from finetune.compute.products import release
from finetune.data.batches.collate import collate
from finetune.data.batches.steps import StepBatch
from finetune.data.encode import EncodedDataset
from finetune.data.types import Batch
from finetune.models.frozen_sample import FrozenSampler, inclusion_chances, measure_frozen_rows
from finetune.models.language_model import LanguageModel
from finetune.models.vocabulary.activate import active_modules
from finetune.models.vocabulary.choice import VocabularyPlan
from finetune.models.vocabulary.rows import NO_TOKEN
from finetune.training.trainer import step_seed

MEASURED_TOKENS = (
    2048  # target tokens on which the model's probabilities are measured, for `sampled`
)
MEASURED_AT = frozenset(16 * 4**k for k in range(16))
"""Steps before which they are measured again, beside the first: the mass moves most at the start."""


def sample_batches(dataset: EncodedDataset, *, pad_id: int, batch_size: int = 4) -> Iterator[Batch]:
    """Examples from all over `dataset`, up to MEASURED_TOKENS target tokens."""
    count, order = 0, range(0, len(dataset), max(1, len(dataset) // 256))
    for start in range(0, len(order), batch_size):
        if count >= MEASURED_TOKENS:
            return
        chosen = order[start : start + batch_size]
        count += sum(dataset.target_counts[i] for i in chosen)
        yield collate(
            [[dataset[i]] for i in chosen], pad_id=pad_id, packed=False, pad_to_multiple_of=1
        )


class VocabularyKeeper:
    """What happens to the vocabulary before each step: tokens that turn up in a stream get rows, and frozen rows are sampled."""

    def __init__(
        self,
        plan: VocabularyPlan,
        language_model: LanguageModel,
        *,
        sample: Callable[[], Iterable[Batch]],
        accelerator: Accelerator,
        note: Callable[[str], None],
        seed: int,
        num_steps: int | None,
    ) -> None:
        self.language_model, self.accelerator = language_model, accelerator
        self.note, self.seed = note, seed
        self.modules = active_modules(language_model)
        self.plan, self.num_steps = plan, num_steps
        self.said: set[str] = set()
        self.left: set[int] = set()  # tokens of a stream for which there was no row
        self.sample, self.sampler, self.follows = sample, None, False
        if plan.num_sampled is not None:
            even = torch.zeros(len(self._head().frozen_ids))  # until the first step
            self.sampler = FrozenSampler(language_model, inclusion_chances(even, plan.num_sampled))

    def before_step(self, step: int, batch: StepBatch) -> None:
        """`step`: optimizer steps taken so far. Every process must call it, with its own share of the step."""
        frozen = self._grow(batch) if self.plan.spare else None
        if self.plan.spare and step + 1 == self.num_steps:
            self._say(self._turned_up())
        if self.sampler is not None and self.plan.num_sampled is not None:
            self._follow(step, self.sampler, self.plan.num_sampled)
            self.sampler.before_step(step_seed(self.seed, step, -1), frozen)

    def line(self) -> str:
        """That of the plan, and what became of a stream."""
        return f"{self.plan.line()}; {self._turned_up()}" if self.plan.spare else self.plan.line()

    def _turned_up(self) -> str:
        active = self.modules[0].vocabulary.num_active
        late = (
            f"; {len(self.left):,} more came (since the last start) when no row was left"
            if self.left
            else ""
        )
        return f"{active:,} tokens train at the end, {active - len(self.plan.ids):,} of which turned up in the stream{late}"

    def _follow(self, step: int, sampler: FrozenSampler, count: int) -> None:
        """Give the sampler the chances that the model's probabilities call for, as they were when last measured."""
        vocabulary = self._head()
        if measure := vocabulary.frozen_mass is None or step in MEASURED_AT:
            with self.accelerator.autocast():
                mass = measure_frozen_rows(self.language_model, self.sample())
            release()  # logits over the whole vocabulary; those of a step are few
            vocabulary.frozen_mass = mass.float().to(vocabulary.frozen_ids.device)
        if (
            measure or not self.follows
        ):  # the first step after a resumption has them from the checkpoint
            sampler.chances, self.follows = (
                inclusion_chances(vocabulary.frozen_mass.cpu(), count),
                True,
            )

    def _head(self) -> Any:
        return self.language_model.causal_lm.get_output_embeddings().vocabulary

    def inactive_tokens(self) -> torch.Tensor | None:
        """[V] bool, true for tokens that the run does not use (inactive, unless all rows train); None where it uses all."""
        inactive = torch.ones(self.plan.rows, dtype=torch.bool)
        inactive[list(self.plan.used)] = False
        for module in self.modules:  # a stream's may have grown
            ids = module.vocabulary.active_ids.cpu()
            inactive[ids[ids != NO_TOKEN]] = False
        return inactive if inactive.any() else None

    def _grow(self, batch: StepBatch) -> torch.Tensor | None:
        """Give new tokens of the step, of all processes, rows as far as there are any; returns those that stay frozen."""
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
        self._say(
            "tokens outside of the first rows of the stream turned up, which train from here on; there is room for "
            f"{self.plan.spare:,} of them"
        )
        if not len(left):
            return None
        self.left.update(left.tolist())
        self._say(
            f"all {self.plan.spare:,} spare rows are taken; tokens that turn up from here on are read and predicted with their "
            "frozen rows (vocabulary.keep, or vocabulary.mode=full, trains them too)"
        )
        return left

    def _say(self, what: str) -> None:
        """Each thing once."""
        if what not in self.said:
            self.said.add(what)
            self.note(f"vocabulary: {what}")
