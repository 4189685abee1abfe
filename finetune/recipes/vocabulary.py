"""The vocabulary section of a config: which rows of the token table a run trains, and how that is kept up from step to step.

Floor 5. See `finetune.models.vocabulary` for what an active vocabulary is, `finetune.models.frozen_sample` for the sampled loss.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from finetune.compute.products import release
from finetune.config import RunConfig
from finetune.data.batches.collate import collate
from finetune.data.batches.steps import StepBatch
from finetune.data.encode import EncodedDataset
from finetune.data.types import Batch
from finetune.errors import UserError
from finetune.models.describe import token_tables
from finetune.models.frozen_sample import FrozenSampler, inclusion_chances, measure_frozen_rows
from finetune.models.language_model import LanguageModel
from finetune.models.tokenizers import byte_tokens, template_tokens
from finetune.models.vocabulary.activate import (
    activate_as_saved,
    activate_vocabulary,
    active_modules,
    why_not_active,
)
from finetune.models.vocabulary.choice import VocabularyPlan
from finetune.models.vocabulary.rows import NO_TOKEN
from finetune.optim import optimizer_info
from finetune.training.trainer import step_seed

SPARE_ROWS = 1024  # kept at least for tokens that turn up later in a stream
MEASURED_TOKENS = (
    2048  # target tokens on which the model's probabilities are measured, for `sampled`
)
MEASURED_AT = frozenset(16 * 4**k for k in range(16))
"""Steps before which they are measured again, beside the first: the mass moves most at the start."""
LITTLE_TO_SAVE = 0.9  # `auto` leaves the table whole where the run uses more of it


def plan_vocabulary(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    corpora: Iterable[EncodedDataset],
    new_tokens: Sequence[int],
    *,
    sharded: bool = False,
) -> VocabularyPlan:
    """Choose the mode and the active tokens. `model` may be without weights; LoRA is not yet on it. `sharded`: no process will have
    the whole of a parameter. Raises UserError."""
    table, head = token_tables(model)
    found = active_ids(tokenizer, corpora, config.vocabulary.keep)
    ids = tuple(sorted(i for i in found if i < len(table)))
    mode: str = config.vocabulary.mode
    reason = ""
    if mode == "auto":
        mode, reason = _automatic(config, model, len(ids), len(new_tokens), sharded)
    if mode == "sampled" and len(ids) + config.vocabulary.num_sampled >= len(table):
        mode, reason = "active", "a sample would be the whole table"
    if (
        mode in ("active", "sampled")
        and (obstacle := why_not_active(model) or _why_not_growing(config, sharded)) is not None
    ):
        raise UserError(
            f"vocabulary.mode is {mode}, but {obstacle}; set vocabulary.mode to full or frozen"
        )
    if mode == "sampled" and sharded:
        raise UserError(
            "vocabulary.mode is sampled, but FSDP2 shards the rows that a sample is drawn from; set vocabulary.mode to active or "
            "full, or train with DDP"
        )
    if mode == "full" and config.model.lora is not None and config.vocabulary.keep:
        raise UserError(
            "vocabulary.keep names rows to train, which LoRA leaves as they are: set vocabulary.mode to frozen or active"
        )
    used = ids
    if mode == "frozen":
        ids = tuple(sorted({*new_tokens, *kept_ids(tokenizer, config.vocabulary.keep)}))
    trains = mode in ("active", "sampled")
    lazy_input = head is not table and _input_is_lazy(config)
    tables = 1 if head is table or lazy_input else 2
    bytes_per_row = table.shape[1] * (4 + optimizer_info(config.optimizer.name).state_bytes)
    spare = spare_rows(len(ids), len(table)) if config.data.streaming and trains else 0
    otherwise = (
        0 if config.model.lora is not None else len(table)
    )  # rows that would have gradients and state
    saved = 0 if mode == "full" else round(tables * (otherwise - len(ids) - spare) * bytes_per_row)
    ids = () if mode == "full" else ids
    num_sampled = config.vocabulary.num_sampled if mode == "sampled" else None
    return VocabularyPlan(
        mode, reason, ids, used, spare, len(table), saved, trains and lazy_input, num_sampled
    )


def spare_rows(num_active: int, num_rows: int) -> int:
    """As many again as are active at the start, at least SPARE_ROWS.

    Translation en-fr with Gemma's tokenizer: 1,000 rows have 4,702 tokens, which with special and byte tokens makes 11,526 active
    ones; over 22,112 rows (1.8 M tokens) it becomes 26,635. 1,024 spare rows last for 556 rows of the stream, half as many as are
    active for 4,093, as many for 12,820. In Gemma-3-270M these are 118 MB with AdamW and, counted, 3 (active) to 7 % (sampled) of a
    step's operations.
    """
    return min(max(SPARE_ROWS, num_active), num_rows - num_active)


def _automatic(
    config: RunConfig, model: Any, num_active: int, num_new: int, sharded: bool
) -> tuple[str, str]:
    table, head = token_tables(model)
    if config.model.lora is not None and config.vocabulary.keep and why_not_active(model) is None:
        return (
            "frozen",
            "LoRA leaves the token table as it is, but for vocabulary.keep and new tokens",
        )
    if config.model.lora is not None:
        return (
            "full",
            f"LoRA leaves the token table as it is{f', but for {num_new} new tokens' if num_new else ''}",
        )
    if head is not table:
        lazy = (
            "lazy_adamw updates only the input rows in use"
            if _input_is_lazy(config)
            else "active would make both compact"
        )
        return "full", f"input and output tables are not tied; {lazy}"
    if (obstacle := why_not_active(model) or _why_not_growing(config, sharded)) is not None:
        return "full", obstacle
    spare = spare_rows(num_active, len(table)) if config.data.streaming else 0
    if num_active + spare > LITTLE_TO_SAVE * len(table):
        kept = f", and {spare:,} would be kept for what turns up later" if spare else ""
        return "full", f"the data uses {num_active:,} of the {len(table):,} rows{kept}"
    return "active", f"the table is tied, and {1 - num_active / len(table):.0%} of it is not used"


def _why_not_growing(config: RunConfig, sharded: bool) -> str | None:
    """Why tokens that turn up in a stream cannot be given rows; None where they can, or where there is no stream."""
    if not config.data.streaming:
        return None
    if sharded:
        return "tokens that turn up in a stream get rows of the table, which FSDP2 shards"
    if optimizer_info(config.optimizer.name).second_weights:
        return f"tokens that turn up in a stream get rows of the table, and {config.optimizer.name} trains a copy that lacks them"
    return None


def _input_is_lazy(config: RunConfig) -> bool:
    """Whether an untied input table stays whole and trains row by row; LoRA would freeze it, new tokens' rows included."""
    return (
        config.model.lora is None
        and optimizer_info(config.optimizer.name).must_know == "embeddings"
    )


def active_ids(
    tokenizer: Any, corpora: Iterable[EncodedDataset], keep: Iterable[int | str]
) -> set[int]:
    """The tokens of the data, special, added, byte and chat template tokens, and those to keep: ids, or texts that have them."""
    ids = {int(i) for corpus in corpora for i in torch.tensor(corpus.token_ids).unique()}
    ids |= {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids |= byte_tokens(tokenizer) | template_tokens(tokenizer)
    return ids | kept_ids(tokenizer, keep)


def kept_ids(tokenizer: Any, keep: Iterable[int | str]) -> set[int]:
    """The ids that `vocabulary.keep` names, itself or by texts. Raises UserError."""
    ids: set[int] = set()
    size = max(tokenizer.get_vocab().values()) + 1
    for item in keep:
        if isinstance(item, int) and not 0 <= item < size:
            raise UserError(f"vocabulary.keep: {item} is no token id; ids go from 0 to {size - 1}")
        found = (
            {item}
            if isinstance(item, int)
            else set(tokenizer(item, add_special_tokens=False).input_ids)
        )
        if not found:
            raise UserError(
                f"vocabulary.keep: the text {item!r} has no tokens; give a text that has some, or an id"
            )
        ids |= found
    return ids


def apply_vocabulary(plan: VocabularyPlan, model: Any, config: RunConfig, *, bf16: bool) -> None:
    """Make the tables of `model` what the plan says, in place. `bf16`: the run's matrix products are in it."""
    if plan.mode == "frozen":
        _freeze_tables(model)
    if plan.ids:
        activate_vocabulary(
            model,
            plan.ids,
            spare=plan.spare,
            compact_input=plan.mode == "frozen" or not _input_is_lazy(config),
            shift=plan.mode != "frozen" and optimizer_info(config.optimizer.name).scale_free,
            frozen_dtype=torch.bfloat16 if bf16 else None,
        )


def apply_saved_vocabulary(
    model: Any, config: RunConfig, state: Mapping[str, torch.Tensor]
) -> None:
    """Make the tables of `model` what they were when the state dict `state` of a run with this config was taken, in place."""
    if config.vocabulary.mode == "frozen":
        _freeze_tables(model)
    activate_as_saved(model, state)


def _freeze_tables(model: Any) -> None:
    for table in token_tables(model):
        if table is not None:
            table.requires_grad_(False)


def sample_batches(dataset: EncodedDataset, *, pad_id: int, rows: int = 4) -> Iterator[Batch]:
    """Examples from all over `dataset`, up to MEASURED_TOKENS target tokens."""
    count, order = 0, range(0, len(dataset), max(1, len(dataset) // 256))
    for start in range(0, len(order), rows):
        if count >= MEASURED_TOKENS:
            return
        chosen = order[start : start + rows]
        count += sum(dataset.target_counts[i] for i in chosen)
        yield collate(
            [[dataset[i]] for i in chosen], pad_id=pad_id, packed=False, pad_to_multiple_of=1
        )


class VocabularyKeeper:
    """What happens to the vocabulary before each step: tokens that turn up in a stream get rows, and frozen rows are sampled."""

    def __init__(
        self,
        config: RunConfig,
        plan: VocabularyPlan,
        language_model: LanguageModel,
        sample: Callable[[], Iterable[Batch]],
        accelerator: Accelerator,
        note: Callable[[str], None],
    ) -> None:
        self.language_model, self.accelerator, self.note, self.seed = (
            language_model,
            accelerator,
            note,
            config.seed,
        )
        self.modules = active_modules(language_model)
        self.plan, self.num_steps = plan, config.training.max_steps
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
