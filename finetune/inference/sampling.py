"""The choice of the next token from its logits: penalties, temperature, top-k and top-p."""

from collections.abc import Sequence

import torch
from torch import Tensor

NUCLEUS = 1024
"""The likeliest tokens that are sorted for `top_p`; all are only if these do not reach it."""


EXTREME = 1e20
"""A penalty or a temperature, and its inverse, beyond which nothing more changes.

Float32 still holds its product with a logit. Greater ones would overflow, and make NaN of 0.
"""


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Return `logits` with the tokens that already occurred made less likely.

    Positive logits are divided by `penalty`, negative ones multiplied. `logits` and the boolean
    `seen` are [prompts, V], `penalty` is one number or [prompts, 1]. A penalty beyond `EXTREME`
    counts as that.
    Section 4.1 of CTRL, https://arxiv.org/abs/1909.05858
    """
    factor = torch.as_tensor(penalty, dtype=torch.float32).clamp(1 / EXTREME, EXTREME)
    logits, factor = logits.float(), factor.to(logits.device)
    penalised = torch.where(logits > 0, logits / factor, logits * factor)
    return torch.where(seen, penalised, logits)


def next_tokens(
    logits: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Return one token for each prompt, [prompts] int64, from `logits` [prompts, V].

    Temperature 0 is greedy, and one beyond `EXTREME` counts as that. `top_k` keeps the k likeliest
    tokens (0: all of them). `top_p` then keeps the fewest of those whose probabilities reach
    `top_p` (1: all of them; https://arxiv.org/abs/1904.09751). `generators` has one CPU generator
    for each prompt, so an answer does not depend on the prompts next to it.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Less the highest: a quotient by a tiny temperature would overflow, and become NaN.
    scaled, tokens = logits.float() - logits.amax(dim=-1, keepdim=True).float(), None
    scaled = scaled / min(max(temperature, 1 / EXTREME), EXTREME)
    if top_k:
        scaled, tokens = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1)
    probabilities = torch.softmax(scaled, dim=-1)
    if top_p < 1:
        probabilities, order = _nucleus(probabilities, top_p)
        tokens = order if tokens is None else tokens.gather(1, order)
    cumulative = probabilities.cumsum(dim=-1)
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(
        logits.device
    )
    # Inverse transform sampling: the first place whose cumulative probability exceeds `uniform`.
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    # The bound guards against rounding at the very end.
    places = torch.arange(probabilities.shape[-1], device=logits.device)
    last_kept = (places * (probabilities > 0)).amax(dim=-1, keepdim=True)
    place = torch.minimum(place, last_kept)
    return (place if tokens is None else tokens.gather(1, place)).squeeze(1)


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the likeliest probabilities, and their places.

    Those after the first that reach `top_p` together are 0. The likeliest one always stays.
    """
    for count in (min(NUCLEUS, probabilities.shape[-1]), probabilities.shape[-1]):
        likeliest, order = probabilities.topk(count, dim=-1)
        cumulative = likeliest.cumsum(dim=-1)
        if (cumulative[:, -1] >= top_p).all():
            break
    return likeliest.masked_fill(cumulative - likeliest >= top_p, 0.0), order
