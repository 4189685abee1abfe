"""Losses by how often a target token occurs in the training data.

Optimizers that scale each coordinate differ most on rare tokens. Kunstner et al.
(https://arxiv.org/abs/2402.19449) attribute the lead of adaptive methods on language to them.
"""

import torch
from torch import Tensor

BINS = ("head", "body", "tail")
UP_TO = (
    0.5,
    0.9,
)  # of the training targets: head makes up half, body the next 40 %


def bins_of(counts: Tensor) -> Tensor:
    """Return the bin of each token, [V] int64, from `counts` [V] of the training targets.

    A token that never occurs is tail.
    """
    order = torch.argsort(counts, descending=True, stable=True)
    ordered = counts[order].double()
    before = (ordered.cumsum(0) - ordered) / ordered.sum()  # the share of more frequent tokens
    bins = torch.empty_like(counts, dtype=torch.int64)
    bins[order] = torch.bucketize(before, torch.tensor(UP_TO, dtype=torch.float64), right=True)
    bins[counts == 0] = len(UP_TO)
    return bins
