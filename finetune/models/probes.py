"""Probes of a model before its first step: what it must do, and what it can do.

Later tokens must not change earlier predictions, and neither may the padding or the other sequences
of a batch. Packed examples may see each other in some architectures: those are not packed. Each
probe is a few forwards over a few tokens.
"""

import copy
import random
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from finetune.data.types import IGNORE_INDEX
from finetune.errors import UserError
from finetune.models.describe import CausalLM, context_length, inner_model, token_tables
from finetune.models.language_model import LanguageModel, evaluating

Probed = TypeVar("Probed", bound=nn.Module)

LENGTH = 16  # tokens of a probe
ODD_LENGTH = 72  # tokens: a multiple of 8, as batches are, and of no larger power of two
EXACT_UP_TO = 20_000_000  # parameters of a model that is probed in float64


def some_ids(model: CausalLM, count: int) -> list[int]:
    """Return ordinary tokens: padding and marks may have meanings of their own in a forward."""
    config: Any = model.config.get_text_config()
    special: set[int] = set()
    for name in ("pad", "bos", "eos"):
        ids = getattr(config, f"{name}_token_id", None)
        special.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    rows = min(len(table) for table in token_tables(model) if table is not None)
    ordinary = [i for i in range(rows) if i not in special] or [0]
    return random.Random(0).choices(ordinary, k=count)


def exact(module: Probed) -> Probed:
    """Return a float64 copy of a small model, and a large one itself.

    A small one may have random weights, whose effects can be smaller than float32's rounding.
    """
    if sum(parameter.numel() for parameter in module.parameters()) > EXACT_UP_TO:
        return module
    try:
        found: Any = copy.deepcopy(module).double()
        model = found.causal_lm if isinstance(found, LanguageModel) else inner_model(found)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # grouped products are not for float64
        with torch.no_grad(), evaluating(model):
            ids = torch.tensor([some_ids(model, 4)], device=model.device)
            model(input_ids=ids, use_cache=False)
    except Exception:  # its code has float32 in it, or an engine shards it
        return module
    return found


def enough_alike(found: Tensor, right: Tensor, effect: Tensor) -> bool:
    """Return whether `found` is `right`, up to rounding. `effect`: how much other tokens change.

    A model of small random weights hardly cares for its context, so a share of the largest value
    alone would not show what is mixed up. NaN is not alike.
    """
    if found.shape != right.shape:
        return False
    # Some models compute parts in float32 whatever the dtype of their weights.
    of_effect, of_largest = (1e-5, 1e-8) if found.dtype == torch.float64 else (0.02, 1e-5)
    bound = of_effect * effect + of_largest * right.abs().max()
    return bool((found - right).abs().max() <= bound)


def check_causal(language_model: LanguageModel) -> None:
    """Raise UserError if a prediction depends on a later token, another sequence, or padding."""
    language_model = exact(language_model)
    model, name = language_model.causal_lm, type(language_model.causal_lm).__name__
    length = min(LENGTH, context_length(model) or LENGTH)
    half, ids = length // 2, some_ids(model, 2 * length)
    first, second = ids[:length], ids[length:]
    changed, early = first[:half] + second[half:], slice(0, half - 1)
    alone = _losses(language_model, first)
    together, other, short = _losses(language_model, changed, second, second[:half]).split(
        [length - 1, length - 1, half - 1]
    )
    effect = (together[half:] - other[half:]).abs().max()  # of the first half on the second
    # The predictions of tokens that were not changed, from such tokens.
    if enough_alike(together[early], alone[early], effect) and enough_alike(
        short, other[early], effect
    ):
        _read_in_training(language_model)
        return
    if enough_alike(_losses(language_model, changed)[early], alone[early], effect):
        raise UserError(
            f"{name} mixes the sequences of a batch: the loss of one depends on the others, or on "
            "its padding. Take another model"
        )
    raise UserError(
        f"{name} sees the tokens that it is to predict: later tokens change its earlier "
        "predictions. Take a decoder, or set is_decoder to true in the model's config"
    )


@torch.no_grad()
def _read_in_training(language_model: LanguageModel) -> None:
    """Raise what the model raises if it reads a text in evaluation mode alone.

    Reformer's training takes multiples of 64 tokens, which its evaluation pads to.
    """
    model = language_model.causal_lm
    length = min(ODD_LENGTH, context_length(model) or ODD_LENGTH)
    ids = torch.tensor([some_ids(model, length)], device=model.device)
    with evaluating(language_model), torch.random.fork_rng(devices=[]):  # dropout draws numbers
        language_model.train()
        language_model(ids, ids)


def check_packing(language_model: LanguageModel) -> None:
    """Raise UserError unless examples packed into one sequence have the losses they have alone."""
    if (reason := why_not_packed(language_model)) is not None:
        raise UserError(f"{reason}. Set data.packing: false")


def why_not_packed(language_model: LanguageModel) -> str | None:
    """Return why examples cannot be packed into one sequence; None if they can.

    Some architectures (Bloom, whose alibi knows no positions) or attention implementations let them
    see each other.
    """
    language_model = exact(language_model)
    model, lengths = language_model.causal_lm, (5, 1, 7, 4)
    device, name = model.device, type(model).__name__
    ids = torch.tensor([some_ids(model, sum(lengths))], device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    labels = torch.where(positions == 0, IGNORE_INDEX, ids)
    with evaluating(language_model):
        pieces = zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)
        alone = torch.cat([language_model.token_losses(*piece) for piece in pieces])
        mixed = language_model.token_losses(ids, labels)
        try:
            packed = language_model.token_losses(ids, labels, positions)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return f"{name} takes no positions that begin anew"
    if enough_alike(packed, alone, (mixed - alone).abs().max()):
        return None
    return (
        f"{name} with {model.config._attn_implementation} attention lets packed examples see each "
        f"other (losses differ by up to {(packed - alone).abs().max():.2g} nats from those of the "
        "examples alone)"
    )


def _losses(language_model: LanguageModel, *texts: list[int]) -> Tensor:
    """Return the loss of each token but the first of each text, padded to one batch."""
    model = language_model.causal_lm
    length, device = max(map(len, texts)), model.device
    pad = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids = [text + [pad] * (length - len(text)) for text in texts]
    labels = [text + [IGNORE_INDEX] * (length - len(text)) for text in texts]
    with evaluating(language_model):
        return language_model.token_losses(
            torch.tensor(ids, device=device), torch.tensor(labels, device=device)
        )
