"""From the logits of a position to the next token: greedy, temperature, top-k, top-p, repetition penalty.

Floor 1. Every row draws from a random stream of its own, so a sampled answer does not depend on the prompts beside it.
"""

from collections.abc import Sequence

import torch


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that already occurred less likely: positive logits are divided by `penalty`, negative ones multiplied.

    `logits` and the boolean `seen` are [rows, vocabulary]. Section 4.1 of CTRL, https://arxiv.org/abs/1909.05858
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def next_tokens(
    logits: torch.Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Choose one token a row, [rows] int64, from `logits` [rows, vocabulary].

    Temperature 0 is greedy. `top_k` keeps the k likeliest tokens (0: all of them); `top_p` then keeps the fewest of those whose
    probabilities reach `top_p` (https://arxiv.org/abs/1904.09751; 1: all of them). `generators` holds one CPU generator a row.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    num_kept = min(top_k, logits.shape[-1]) if top_k else logits.shape[-1]
    sorted_logits, tokens = logits.float().topk(num_kept, dim=-1)
    probabilities = torch.softmax(sorted_logits / temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # A token stays while those before it have not reached top_p: the likeliest one always does.
    probabilities = probabilities.masked_fill(cumulative - probabilities >= top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(
        logits.device
    )
    # Inverse transform sampling: the first place where the cumulative probability passes the uniform number.
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    last_kept = (probabilities > 0).sum(
        dim=-1, keepdim=True
    ) - 1  # guards against rounding at the very end
    return tokens.gather(1, torch.minimum(place, last_kept)).squeeze(1)
