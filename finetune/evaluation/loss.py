"""The loss over held-out data, exact to the token.

Floor 3. Sum over sum: the nats of all target tokens divided by their number, so that the result depends neither on how the data is
cut into batches nor on the number of processes (up to the rounding of the forward pass).
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from finetune.data.types import IGNORE_INDEX, Batch, Tokenizer
from finetune.errors import UserError
from finetune.metrics import bits_per_byte, perplexity
from finetune.models.language_model import evaluating

MASS_BINS = 1000
"""Positions are counted by how much probability goes to tokens outside, which adds up over processes as a quantile does not."""


@dataclass(frozen=True, slots=True)
class LossResult:
    """What evaluate_loss found.

    `bits_per_byte` spreads all nats, those of end marks included, over the UTF-8 bytes of the target text, which has no special
    tokens: a model pays for knowing where to stop, and gets no bytes for it.
    """

    loss: float  # nats per target token
    perplexity: float
    bits_per_byte: float
    num_target_tokens: int
    num_target_bytes: int
    vocabulary: "VocabularyLoss | None" = None

    def as_dict(self) -> dict[str, float]:
        """All numbers, those of `vocabulary` among them; what does not exist is left out."""
        found = asdict(self)
        parts = found.pop("vocabulary") or {}
        return {key: value for key, value in {**found, **parts}.items() if value is not None}


@dataclass(frozen=True, slots=True)
class VocabularyLoss:
    """The loss apart for tokens that a run uses (inside its vocabulary) and for the others (whose rows are frozen, if any are)."""

    loss_inside: float | None  # nats per target token; None where there is no such target
    loss_outside: float | None
    share_outside: float  # of the target tokens
    inactive_mass: float  # the probability that goes to tokens outside, mean over target positions
    inactive_mass_p99: (
        float  # at 99 % of the target positions it is at most that; up to 1 / MASS_BINS too high
    )


def evaluate_loss(
    loss_module: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    inactive: torch.Tensor | None = None,
    tokenizer: Tokenizer,
    device: torch.device,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    on_progress: Callable[[int], None] | None = None,
) -> LossResult:
    """Return the loss over all target tokens of `batches`.

    `loss_module(input_ids=, labels=[, position_ids=], reduction="none"[, inactive=])` returns the scores of each target token of a
    batch, as `LanguageModel` does. It is put in evaluation mode and back. `batches` are this process's share; `reduce` adds a
    float64 tensor of sums up over the processes. `inactive`: [V] bool, the tokens outside, where the loss is wanted apart.
    `on_progress(n)` is called after the n-th batch. Raises UserError if there is no target token.
    """
    sums = torch.zeros(6 + MASS_BINS, dtype=torch.float64)
    inactive = None if inactive is None else inactive.to(device)
    options: dict[str, Any] = {"reduction": "none"} | (
        {} if inactive is None else {"inactive": inactive}
    )
    with evaluating(loss_module), torch.inference_mode():
        for number, batch in enumerate(batches, start=1):
            tensors = cast(dict[str, torch.Tensor], batch)
            on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
            losses, masses = loss_module(**on_device, **options).double().unbind(1)
            sums[0] += losses.sum().cpu()
            sums[1] += len(losses)
            sums[2] += count_target_bytes(batch["labels"], tokenizer)
            if inactive is not None:
                labels = on_device["labels"][:, 1:]
                outside = inactive[labels[labels != IGNORE_INDEX]]
                sums[3:6] += torch.stack([losses[outside].sum(), outside.sum(), masses.sum()]).cpu()
                bins = (masses.nan_to_num(1.0) * MASS_BINS).long().clamp(0, MASS_BINS - 1)
                sums[6:] += bins.bincount(minlength=MASS_BINS).cpu()
            if on_progress is not None:
                on_progress(number)
    sums = reduce(sums)
    total_nats, num_tokens, num_bytes, nats_outside, num_outside, mass = sums[:6].tolist()
    if not num_tokens:
        raise UserError(
            "the held-out data has no target token, so there is no loss to compute: give other data, or more of it"
        )
    loss = total_nats / num_tokens
    apart = None
    if inactive is not None:
        num_inside = num_tokens - num_outside
        apart = VocabularyLoss(
            loss_inside=(total_nats - nats_outside) / num_inside if num_inside else None,
            loss_outside=nats_outside / num_outside if num_outside else None,
            share_outside=num_outside / num_tokens,
            inactive_mass=mass / num_tokens,
            inactive_mass_p99=(int((sums[6:].cumsum(0) < 0.99 * num_tokens).sum()) + 1) / MASS_BINS,
        )
    return LossResult(
        loss,
        perplexity(loss),
        bits_per_byte(total_nats, int(num_bytes)),
        int(num_tokens),
        int(num_bytes),
        apart,
    )


def count_target_bytes(labels: torch.Tensor, tokenizer: Tokenizer) -> int:
    """Return the UTF-8 bytes of the target text in `labels` [rows, length]: each unbroken span of targets decoded by itself."""
    num_bytes = 0
    for row in labels.tolist():
        span: list[int] = []
        for label in [*row, IGNORE_INDEX]:
            if label != IGNORE_INDEX:
                span.append(label)
            elif span:
                num_bytes += len(tokenizer.decode(span, skip_special_tokens=True).encode())
                span = []
    return num_bytes
