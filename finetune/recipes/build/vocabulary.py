"""The vocabulary section of a config: which rows of the token table a run trains.

`finetune.models.vocabulary` explains what an active vocabulary is, and its `frozen_sample` the
sampled loss. `finetune.training.vocabulary` keeps it up from step to step.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from finetune.config import RunConfig
from finetune.data.encode import EncodedDataset
from finetune.errors import UserError
from finetune.models.describe import token_tables
from finetune.models.tokenizers import byte_tokens, template_tokens
from finetune.models.vocabulary.activate import (
    activate_as_saved,
    activate_vocabulary,
    why_not_active,
)
from finetune.models.vocabulary.choice import VocabularyPlan
from finetune.optim import optimizer_info
from finetune.recipes.build.optimizer import may_be_lazy

SPARE_ROWS = 1024  # at least as many are kept for tokens that turn up later in a stream
LITTLE_TO_SAVE = 0.9  # `auto` leaves the table whole if the run uses a larger share of it


def plan_vocabulary(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    corpora: Iterable[EncodedDataset],
    new_tokens: Sequence[int],
    *,
    sharded: bool = False,
) -> VocabularyPlan:
    """Choose the mode and the active tokens.

    `model` may be without weights, and must be without LoRA. `sharded`: no process will hold the
    whole of a parameter. Raises UserError if the mode of the config cannot be had.
    """
    table, head = token_tables(model)
    found = active_ids(tokenizer, corpora, config.vocabulary.keep)
    ids = tuple(sorted(i for i in found if i < len(table)))
    mode: str = config.vocabulary.mode
    reason = ""
    if mode == "auto":
        mode, reason = _automatic(config, model, len(ids), len(new_tokens), sharded)
    if mode == "sampled" and len(ids) + config.vocabulary.num_sampled >= len(table):
        mode, reason = "active", "a step would draw the whole table"
    if (
        mode in ("active", "sampled")
        and (obstacle := why_not_active(model) or _why_not_growing(config, sharded)) is not None
    ):
        raise UserError(
            f"vocabulary.mode is {mode}, but {obstacle}. Set vocabulary.mode to full or frozen"
        )
    if mode == "sampled" and sharded:
        raise UserError(
            "vocabulary.mode is sampled, but FSDP2 shards the rows to draw from. "
            "Set vocabulary.mode to active or full, or train with DDP"
        )
    if mode == "full" and config.model.lora is not None and config.vocabulary.keep:
        raise UserError(
            "vocabulary.keep names rows to train, and with LoRA and vocabulary.mode full no row "
            "trains. Set vocabulary.mode to frozen or active"
        )
    used = ids
    if mode == "frozen":
        ids = tuple(sorted({*new_tokens, *kept_ids(tokenizer, config.vocabulary.keep)}))
    trains = mode in ("active", "sampled")
    lazy_input = head is not table and _input_is_lazy(config, sharded=sharded)
    tables = 1 if head is table or lazy_input else 2
    bytes_per_row = table.shape[1] * (4 + optimizer_info(config.optimizer.name).state_bytes)
    spare = spare_rows(len(ids), len(table)) if config.data.streaming and trains else 0
    # the rows that would have gradients and state in mode full
    otherwise = 0 if config.model.lora is not None else len(table)
    saved = 0 if mode == "full" else round(tables * (otherwise - len(ids) - spare) * bytes_per_row)
    ids = () if mode == "full" else ids
    num_sampled = config.vocabulary.num_sampled if mode == "sampled" else None
    return VocabularyPlan(
        mode, reason, ids, used, spare, len(table), saved, trains and lazy_input, num_sampled
    )


def spare_rows(num_active: int, num_rows: int) -> int:
    """Return how many rows to keep for later tokens: as many as are active, at least SPARE_ROWS.

    Measured on English-French translation with Gemma's tokenizer. The first 1,000 records have
    4,702 tokens, and 11,526 are active with special and byte tokens. After 22,112 records (1.8 M
    tokens) it is 26,635. 1,024 spare rows last for 556 records of the stream, half as many as are
    active for 4,093, as many for 12,820. In Gemma-3-270M as many take 118 MB with AdamW and,
    counted, 3 % (active) to 7 % (sampled) of a step's operations.
    """
    return min(max(SPARE_ROWS, num_active), num_rows - num_active)


def _automatic(
    config: RunConfig, model: Any, num_active: int, num_new: int, sharded: bool
) -> tuple[str, str]:
    """Return the mode that `auto` stands for, and why."""
    table, head = token_tables(model)
    if config.model.lora is not None and config.vocabulary.keep and why_not_active(model) is None:
        return (
            "frozen",
            "LoRA leaves the token table as it is, except for vocabulary.keep and new tokens",
        )
    if config.model.lora is not None:
        new = f", except for {num_new} new tokens" if num_new else ""
        return "full", f"LoRA leaves the token table as it is{new}"
    if head is not table:
        lazy = (
            f"{config.optimizer.name} updates only the input rows in use"
            if _input_is_lazy(config, sharded=sharded)
            else "active would make both compact"
        )
        return "full", f"input and output tables are not tied; {lazy}"
    if (obstacle := why_not_active(model) or _why_not_growing(config, sharded)) is not None:
        return "full", obstacle
    spare = spare_rows(num_active, len(table)) if config.data.streaming else 0
    if num_active + spare > LITTLE_TO_SAVE * len(table):
        kept = f", and {spare:,} would be kept for later tokens" if spare else ""
        return "full", f"the data uses {num_active:,} of the {len(table):,} rows{kept}"
    return "active", f"the table is tied, and {1 - num_active / len(table):.0%} of it is not used"


def _why_not_growing(config: RunConfig, sharded: bool) -> str | None:
    """Return why later tokens of a stream cannot get rows, or None if they can or need not."""
    if not config.data.streaming:
        return None
    if sharded:
        return "later tokens of a stream get rows of the table, and FSDP2 shards it"
    if optimizer_info(config.optimizer.name).second_weights:
        return (
            "later tokens of a stream get rows of the table, and "
            f"{config.optimizer.name} trains a copy that lacks them"
        )
    return None


def _input_is_lazy(config: RunConfig, *, sharded: bool) -> bool:
    """Return whether an untied input table stays whole and trains row by row.

    With LoRA it does not: LoRA would freeze it, with the rows of new tokens.
    """
    return config.model.lora is None and may_be_lazy(config, sharded=sharded)


def active_ids(
    tokenizer: Any, corpora: Iterable[EncodedDataset], keep: Iterable[int | str]
) -> set[int]:
    """Return the ids of all tokens in use.

    They are the tokens of the data, special, added, byte and chat template tokens, and those of
    `keep`: ids, or texts whose tokens are meant.
    """
    ids = {i for corpus in corpora for i in corpus.used_ids}
    ids |= {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids |= byte_tokens(tokenizer) | template_tokens(tokenizer)
    return ids | kept_ids(tokenizer, keep)


def kept_ids(
    tokenizer: Any, keep: Iterable[int | str], *, key: str = "vocabulary.keep"
) -> set[int]:
    """Return the ids that `vocabulary.keep` names, as ids or by texts.

    Raises UserError, which calls them `key`.
    """
    ids: set[int] = set()
    size = max(tokenizer.get_vocab().values()) + 1
    for item in keep:
        if isinstance(item, int) and not 0 <= item < size:
            raise UserError(f"{key}: {item} is not a token id; ids go from 0 to {size - 1}")
        found = {item} if isinstance(item, int) else _ids_of(tokenizer, item)
        if not found:
            raise UserError(
                f"{key}: the text {item!r} has no tokens. Give a text that has some, or a token id"
            )
        ids |= found
    return ids


def apply_vocabulary(plan: VocabularyPlan, model: Any, config: RunConfig, *, bf16: bool) -> None:
    """Make the tables of `model` what the plan says, in place.

    `bf16`: the run's matrix products are in bfloat16, and so are the frozen rows then.
    """
    if plan.mode == "frozen":
        _freeze_tables(model)
    if plan.ids:
        activate_vocabulary(
            model,
            plan.ids,
            spare=plan.spare,
            compact_input=not plan.whole_input,
            shift=plan.mode != "frozen" and optimizer_info(config.optimizer.name).scale_free,
            frozen_dtype=torch.bfloat16 if bf16 else None,
        )


def apply_saved_vocabulary(
    model: Any, config: RunConfig, state: Mapping[str, torch.Tensor]
) -> None:
    """Make the tables of `model` what they were in the run that `state` is from, in place.

    `state` is the state dict of a run with this config.
    """
    if config.vocabulary.mode == "frozen":
        _freeze_tables(model)
    activate_as_saved(model, state)


def _freeze_tables(model: Any) -> None:
    for table in token_tables(model):
        if table is not None:
            table.requires_grad_(False)


def _ids_of(tokenizer: Any, text: str) -> set[int]:
    return set(tokenizer(text, add_special_tokens=False).input_ids)
