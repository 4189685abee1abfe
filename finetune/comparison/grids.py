"""Where the search for a learning rate begins, how it goes on, and when it is widened.

Floor 1.
"""

from collections.abc import Mapping

from finetune.optim import optimizer_info

ADAMW_LR = {"random": 3e-3, "pretrained": 1e-4, "lora": 3e-4}
"""The middle of AdamW's grid, by what is trained: a model with random weights, a pretrained one, adapters of one."""

TIMES_ADAMW = {
    "sgd": 300.0,
    "momentum": 30.0,
    "nesterov": 30.0,
    "adagrad": 10.0,
    "rmsprop": 1.0,
    "adam": 1.0,
    "adamw": 1.0,
    "sparse_adam": 1.0,
    "lazy_adamw": 1.0,
    "adamw_8bit": 1.0,
    "adafactor": 10.0,
    "lion": 0.1,
    "muon": 10.0,
    "schedule_free_adamw": 3.0,
}
"""The middle of each optimizer's grid over that of AdamW. SGD's is high because the gradients are clipped to a norm of 1, which
Adam's division by their size undoes and SGD's step does not. A grid that begins in the wrong place is widened. Best of
their grids in 40 steps of configs/tiny_chat.yaml: sgd 0.9, momentum 0.09, adagrad 0.03, rmsprop 0.003, adam and adamw 0.009. On
SmolLM2-135M, where SGD's grid lies around 0.03, SGD at 0.9 diverged in 5 steps."""

MAX_WIDENINGS = 4  # learning rates added at the ends of one grid, at most: two decades
WEIGHT_DECAYS = (0.0, 0.01, 0.1)


def centre(name: str, start: str) -> float:
    """The middle of the grid of optimizer `name`, for a `start` of "random", "pretrained" or "lora".

    For an optimizer that is not in the table, the learning rate that its class has by default.
    """
    if name in TIMES_ADAMW:
        return _rounded(ADAMW_LR[start] * TIMES_ADAMW[name])
    return float(optimizer_info(name).options["lr"])


def lr_grid(middle: float, count: int) -> list[float]:
    """`count` learning rates around `middle`, half a decade apart: 3 and 10/3 times in turn, so that they are short numbers.

    Of an even number one more lies below the middle than above.
    """
    return [
        _rounded(middle * 10 ** (k // 2) * (3 if k % 2 else 1))
        for k in range(-(count // 2), count - count // 2)
    ]


def wider(losses: Mapping[float, float]) -> float | None:
    """The learning rate to try next because the best of those tried lies at an end of the grid; None where it does not.

    `losses`: of each learning rate tried, infinite where the run diverged. Of equal losses the lowest learning rate counts as the
    best, so that a grid on which everything diverged goes on below. Fewer than three learning rates are no grid to widen.
    """
    if len(losses) < 3:
        return None
    lrs = sorted(losses)
    best = min(lrs, key=lambda lr: losses[lr])
    if best == lrs[0]:
        return _rounded(lrs[1] / 10)
    return _rounded(lrs[-2] * 10) if best == lrs[-1] else None


def _rounded(lr: float) -> float:
    """To three digits: what is tried is what is shown."""
    return float(f"{lr:.3g}")
