"""The loss over held-out data, exact to the token.

Sum over sum: the nats of all target tokens, divided by the number of these tokens. So the result
depends neither on how the data is cut into batches nor on the number of processes (up to the
rounding of the forward pass).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from finetune.data.types import IGNORE_INDEX, MicroBatch, Tokenizer
from finetune.errors import UserError
from finetune.models.language_model import evaluating

MASS_BINS = 1000
"""Positions are counted by how much probability goes to tokens that the run does not use.

Counts add up over processes, which a quantile does not.
"""


class GroupLoss(NamedTuple):
    """The loss of the target tokens of one group."""

    nats: float  # summed over them
    num_target_tokens: int


@dataclass(frozen=True, slots=True)
class LossResult:
    """What evaluate_loss found.

    `bits_per_byte` spreads all nats over the UTF-8 bytes of the target text. The nats include those
    of end marks, and the text has no special tokens: a model pays for knowing where to stop, and
    gets no bytes for it.
    """

    loss: float  # nats per target token
    perplexity: float
    bits_per_byte: float
    num_target_tokens: int
    num_target_bytes: int
    vocabulary: "VocabularyLoss | None" = None
    by_group: tuple[GroupLoss, ...] = ()  # in the order of the groups' numbers

    def as_dict(self) -> dict[str, float]:
        """Return all numbers but `by_group`, those of `vocabulary` included, if they exist."""
        found = asdict(self)
        del found["by_group"]
        parts = found.pop("vocabulary") or {}
        return {key: value for key, value in {**found, **parts}.items() if value is not None}


@dataclass(frozen=True, slots=True)
class VocabularyLoss:
    """The loss apart for tokens that a run uses (inside its vocabulary) and for the others.

    The rows of the others are frozen, if any are.
    """

    loss_inside: float | None  # nats per target token; None if there is no such target
    loss_outside: float | None
    share_outside: float  # of the target tokens
    inactive_mass: float  # the probability of tokens outside, mean over target positions
    inactive_mass_p99: float  # its 99 % quantile over these; up to 1 / MASS_BINS too high


def evaluate_loss(
    loss_module: torch.nn.Module,
    batches: Iterable[MicroBatch],
    *,
    inactive: Tensor | None = None,
    groups: Tensor | None = None,
    num_bytes: int,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    on_progress: Callable[[int], None] | None = None,
) -> LossResult:
    """Return the loss over all target tokens of `batches`.

    `loss_module(**batch, reduction="none"[, inactive=])` returns the scores of each target token of
    a batch, as `LanguageModel` does. It is put in evaluation mode and back. `batches` are this
    process's share, with `num_bytes` of target text (see `count_target_bytes`). `reduce` adds a
    float64 tensor of sums up over the processes. `on_progress(n)` is called after the n-th batch.

    `inactive`: [V] bool, the tokens outside, to have the loss apart for them. `groups`: [V] int64,
    the group of each token id, counted from 0, to have the loss by the group of the target token.
    Raises UserError if there is no target token.
    """
    outside = None if inactive is None else inactive.cpu()
    inactive = None if inactive is None else inactive.to(device)
    options = {"reduction": "none"} | ({} if inactive is None else {"inactive": inactive})
    sums = _Sums.zeros(0 if groups is None else int(groups.max()) + 1)
    with evaluating(loss_module), torch.inference_mode():
        for number, batch in enumerate(batches, start=1):
            tensors = cast(dict[str, Tensor], batch)
            on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
            # On the CPU: a GPU adds in no fixed order, and one of Apple has no float64.
            losses, masses = loss_module(**on_device, **options).cpu().double().unbind(1)
            targets = tensors["targets"][:, 1].cpu()
            sums.add(losses)
            if outside is not None:
                sums.add_outside(losses, masses, outside[targets])
            if groups is not None:
                sums.add_by_group(losses, groups[targets])
            if on_progress is not None:
                on_progress(number)
    sums.total[2] += num_bytes
    sums = _Sums(reduce(sums.flat), sums.num_groups)
    total_nats, num_tokens, all_bytes = sums.total.tolist()
    if not num_tokens:
        raise UserError(
            "the held-out data has no target token, so there is no loss to compute. Give other "
            "data, or more of it"
        )
    loss = total_nats / num_tokens
    return LossResult(
        loss,
        perplexity(loss),
        bits_per_byte(total_nats, int(all_bytes)),
        int(num_tokens),
        int(all_bytes),
        None if inactive is None else sums.vocabulary_loss(),
        tuple(GroupLoss(nats, int(count)) for nats, count in sums.by_group.t().tolist()),
    )


class _Sums:
    """What is counted over all target tokens, as views of one float64 tensor that adds up."""

    def __init__(self, flat: Tensor, num_groups: int) -> None:
        self.flat, self.num_groups = flat, num_groups
        self.total, self.outside, self.mass_bins, by_group = flat.split(
            [3, 3, MASS_BINS, 2 * num_groups]
        )  # nats, tokens, bytes; nats and tokens outside, mass outside; positions
        self.by_group = by_group.view(2, num_groups)  # nats, tokens

    @classmethod
    def zeros(cls, num_groups: int) -> "_Sums":
        return cls(torch.zeros(6 + MASS_BINS + 2 * num_groups, dtype=torch.float64), num_groups)

    def add(self, losses: Tensor) -> None:
        self.total[0] += losses.sum()
        self.total[1] += len(losses)

    def add_outside(self, losses: Tensor, masses: Tensor, outside: Tensor) -> None:
        self.outside += torch.stack([losses[outside].sum(), outside.sum(), masses.sum()])
        bins = (masses.nan_to_num(1.0) * MASS_BINS).long().clamp(0, MASS_BINS - 1)
        self.mass_bins += bins.bincount(minlength=MASS_BINS)

    def add_by_group(self, losses: Tensor, groups: Tensor) -> None:
        self.by_group[0] += groups.bincount(losses, minlength=self.num_groups)
        self.by_group[1] += groups.bincount(minlength=self.num_groups)

    def vocabulary_loss(self) -> VocabularyLoss:
        total_nats, num_tokens, _ = self.total.tolist()
        nats_outside, num_outside, mass = self.outside.tolist()
        num_inside = num_tokens - num_outside
        below_p99 = int((self.mass_bins.cumsum(0) < 0.99 * num_tokens).sum())
        return VocabularyLoss(
            loss_inside=(total_nats - nats_outside) / num_inside if num_inside else None,
            loss_outside=nats_outside / num_outside if num_outside else None,
            share_outside=num_outside / num_tokens,
            inactive_mass=mass / num_tokens,
            inactive_mass_p99=(below_p99 + 1) / MASS_BINS,
        )


def count_target_bytes(labels: Iterable[int], tokenizer: Tokenizer) -> int:
    """Return the UTF-8 bytes of the target text in the `labels` of an example.

    Each unbroken span of targets is decoded by itself.
    """
    num_bytes, span = 0, list[int]()
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            span.append(label)
        elif span:
            num_bytes += len(tokenizer.decode(span, skip_special_tokens=True).encode())
            span = []
    return num_bytes


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats per token; infinity if that is more than a float can hold."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return `nats`, a sum over tokens, as bits per byte of their text; NaN without bytes.

    This makes tokenizers comparable.
    """
    return nats / math.log(2) / num_bytes if num_bytes else math.nan
