"""The step of LazyAdamW's dense parameters: torch's own AdamW."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from finetune.errors import UserError


def step_dense(
    state: dict[Tensor, Any], params: Iterable[Tensor], group: dict[str, Any], *, fused: bool
) -> None:
    """Apply AdamW's next step to `params`, and make the state of those that have none.

    If `fused`, it is torch's fused kernel where that is right. Otherwise it is the loop whose
    operations step the rows in the mode "replay". Raises UserError if moments are of another shape.
    """
    # The fused kernel walks over memory as it lies. torch checks neither strides nor the shapes of
    # the moments.
    alike: list[Tensor] = []
    others: list[Tensor] = []
    for param in params:
        entry = state[param]
        if not entry:
            entry["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            entry["exp_avg"] = torch.zeros_like(param)
            entry["exp_avg_sq"] = torch.zeros_like(param)
        grad, exp_avg, exp_avg_sq = param.grad, entry["exp_avg"], entry["exp_avg_sq"]
        if not (param.is_same_size(exp_avg) and param.is_same_size(exp_avg_sq)):
            raise UserError(
                f"the optimizer's state of a parameter {list(param.shape)} has moments of "
                f"{list(exp_avg.shape)}. Load the state that was saved with this model"
            )
        contiguous = param.is_contiguous() and grad is not None and grad.is_contiguous()
        contiguous = contiguous and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()
        (alike if contiguous and fused else others).append(param)
    _adamw(state, alike, group, fused=True)
    _adamw(state, others, group, fused=False)


def _adamw(
    state: dict[Tensor, Any], params: list[Tensor], group: dict[str, Any], *, fused: bool
) -> None:
    if fused:
        for param in params:
            step = state[param]["step"]  # may have been saved in half precision
            wide = torch.promote_types(step.dtype, torch.float32)
            state[param]["step"] = step.to(param.device, wide)
    adamw(
        params,
        [param.grad for param in params if param.grad is not None],
        [state[param]["exp_avg"] for param in params],
        [state[param]["exp_avg_sq"] for param in params],
        [],
        [state[param]["step"] for param in params],
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
