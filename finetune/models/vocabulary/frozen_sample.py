"""Frozen rows drawn to stand for all of them in the softmax of a step: for large vocabularies.

Row j is drawn with chance pi_j, and its logit is raised by -log pi_j. So the sum over the drawn
rows estimates the sum over all frozen rows without bias (Horvitz and Thompson, 1952). The chances
follow the probability that the model gives each token on some of the training data. They are
proportional to its root mean square over positions, which minimises the variance of the sum. A
share is spread evenly, because training moves probability to tokens that had none. The rows that
matter most have chance 1.

The chances are measured before training, and best again now and then. A token that has become
likely but is hardly ever drawn makes a step rough when it is. (`FrozenSampler.chances` may change
between steps.) Each step draws anew, systematically and in random order, so that every draw has the
same size. The generator is one of its own: the same rows on every process and however a step is
cut.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from finetune.compute.loss import FrozenRows
from finetune.data.types import MicroBatch
from finetune.errors import UserError
from finetune.models.language_model import NOT_SAMPLED, LanguageModel, evaluating
from finetune.models.vocabulary.rows import ActiveHead

SPREAD = 0.25
"""The share of the drawn rows that is spread evenly over all frozen rows."""


def inclusion_chances(weights: Tensor, count: int) -> Tensor:
    """Return chances [F] in (0, 1], float64, that add up to `count` (at most F).

    They follow `weights` [F] >= 0, except for the even share. Raises UserError for a `count` below
    1, and for weights that are negative, infinite or NaN.
    """
    weights, rows = weights.double(), len(weights)
    if not bool((weights >= 0).all() & weights.isfinite().all()):
        raise UserError(
            "the chances of the frozen rows follow weights from 0 up, and some of those given are "
            "negative, infinite or NaN"
        )
    if count < 1:
        raise UserError(f"the number of frozen rows to draw is {count}. Draw at least one")
    if count >= rows:
        return torch.ones_like(weights)
    even = torch.full_like(weights, 1 / rows)
    score = SPREAD * even + (1 - SPREAD) * (weights / weights.sum() if weights.sum() > 0 else even)
    sure = torch.zeros(rows, dtype=torch.bool)
    while True:
        chance = (count - sure.sum()) * score / score[~sure].sum()
        over = (chance >= 1) & ~sure
        if not over.any():
            return chance.where(~sure, 1.0)
        sure |= over


def draw_rows(chances: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows [K] int64, each with its chance.

    K is the sum of the chances (up to rounding), the same for every draw.
    """
    order = torch.randperm(len(chances), generator=generator)
    ends = chances[order].cumsum(0)
    count = round(float(ends[-1]))
    points = torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(count)
    return order[
        torch.searchsorted(ends, points.clamp(max=float(ends[-1])), right=True).clamp_(
            max=len(order) - 1
        )
    ].unique()


@torch.no_grad()
def measure_frozen_rows(language_model: LanguageModel, batches: Iterable[MicroBatch]) -> Tensor:
    """Return the root mean square of each frozen row's probability: [F] float64 on the CPU.

    The mean is over the target positions of `batches`. Raises UserError as FrozenSampler does, and
    if there is no target.
    """
    _require_known_logits(language_model)
    device = language_model.causal_lm.device
    total, count = torch.zeros((), dtype=torch.float64), 0
    with evaluating(language_model):
        for batch in batches:
            tensors = {
                key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)
            }
            squares, positions = language_model.frozen_square_probabilities(**tensors)
            total, count = total + squares.cpu().double(), count + positions
    if not count:
        raise UserError(
            "no chances without data: measure_frozen_rows needs batches with target tokens"
        )
    return (total / count).sqrt()


class FrozenSampler:
    """Frozen rows drawn anew for a LanguageModel before each step.

    The model has an active vocabulary (`activate_vocabulary`), and `chances` [F] come from
    `inclusion_chances`. The drawn rows are used in training mode only: in evaluation mode the loss
    is exact. Raises UserError if the model makes its logits in its own way. Also raises it unless
    there is one chance for each frozen row, above 0 and at most 1.
    """

    def __init__(self, language_model: LanguageModel, chances: Tensor) -> None:
        _require_known_logits(language_model)
        self.language_model, self.chances = language_model, chances

    @property
    def chances(self) -> Tensor:
        """The chances [F] (see `inclusion_chances`); may be set anew between steps."""
        return self._chances

    @chances.setter
    def chances(self, chances: Tensor) -> None:
        head: Any = self.language_model.causal_lm.get_output_embeddings()
        rows = len(head.vocabulary.frozen_ids)
        if chances.shape != (rows,) or not bool(((chances > 0) & (chances <= 1)).all()):
            given = "some of those given are not"
            if chances.shape != (rows,):
                given = f"{len(chances)} chances are given"
            raise UserError(
                f"each of the {rows} frozen rows needs a chance above 0 and at most 1, and "
                f"{given}. Make them with inclusion_chances"
            )
        self._chances = chances

    @torch.no_grad()
    def before_step(self, seed: int, targets: Tensor | None = None) -> None:
        """Draw the rows of one step from `seed`, those of the tokens `targets` [n] among them.

        Without `targets`, all targets of the step must be active: the LanguageModel refuses one
        that is neither active nor drawn.
        """
        head = self.language_model.causal_lm.get_output_embeddings()
        assert isinstance(head, ActiveHead)
        vocabulary, compact = head.vocabulary, len(head.weight)
        chances = self.chances
        rows = draw_rows(chances, torch.Generator().manual_seed(seed))
        if targets is not None:  # they are certain to be there, so they stand for themselves alone
            wanted = vocabulary.row_of_id[targets.to(vocabulary.row_of_id.device)].cpu() - compact
            wanted = wanted[wanted >= 0]
            rows, chances = torch.cat([rows, wanted]).unique(), chances.index_fill(0, wanted, 1.0)
        device = head.weight.device
        log_chances = chances[rows].log().float().to(device)
        rows = rows.to(device)
        offset = torch.cat(
            [vocabulary.offset[:compact], vocabulary.offset[compact:][rows] - log_chances]
        )
        row_of_id = vocabulary.row_of_id.masked_fill(vocabulary.row_of_id >= compact, NOT_SAMPLED)
        frozen = vocabulary.frozen_ids[rows]
        # A token that has become active keeps its compact row.
        still = vocabulary.row_of_id[frozen] >= compact
        row_of_id[frozen[still]] = compact + torch.arange(len(rows), device=device)[still]
        self.language_model.sample = (
            FrozenRows(vocabulary.frozen.index_select(0, rows), offset),
            row_of_id,
        )


def _require_known_logits(language_model: LanguageModel) -> None:
    if not isinstance(language_model.causal_lm.get_output_embeddings(), ActiveHead):
        raise UserError(
            "there are no frozen rows to draw from. Call activate_vocabulary on the model first"
        )
    if not language_model.fused:
        raise UserError(
            f"{type(language_model.causal_lm).__name__} computes its logits in a way of its own, "
            "all of them at once, so drawn frozen rows cannot stand for the rest "
            "(vocabulary.mode=sampled). Set vocabulary.mode to active, or to full"
        )
