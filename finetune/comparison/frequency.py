"""Losses by how often a target token occurs in the training data: where optimizers differ that scale each coordinate.

Floor 1. That adaptive methods owe their lead on language to the rare tokens: Kunstner et al., https://arxiv.org/abs/2402.19449.
"""

import torch
from torch import Tensor

BINS = ("head", "body", "tail")
UP_TO = (
    0.5,
    0.9,
)  # head: the most frequent tokens that make up half of all training targets; body: the next 40 %; tail: the rest


def bins_of(counts: Tensor) -> Tensor:
    """Which bin each token belongs to, [V] int64, from `counts` [V] of the training targets. What never occurs is tail."""
    order = torch.argsort(counts, descending=True, stable=True)
    ordered = counts[order].double()
    before = (
        ordered.cumsum(0) - ordered
    ) / ordered.sum()  # the share of all targets that more frequent tokens make up
    bins = torch.empty_like(counts, dtype=torch.int64)
    bins[order] = torch.bucketize(before, torch.tensor(UP_TO, dtype=torch.float64), right=True)
    bins[counts == 0] = len(UP_TO)
    return bins


def add_up(losses: Tensor, targets: Tensor, bins: Tensor) -> Tensor:
    """Sum of the losses and number of tokens of each bin, [2, 3] float64, from losses and target tokens [N]."""
    which = bins[targets]
    sums = torch.bincount(which, weights=losses.double(), minlength=len(BINS))
    return torch.stack([sums, torch.bincount(which, minlength=len(BINS)).double()])
