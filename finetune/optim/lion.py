"""Lion: the sign of an interpolated momentum.

Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, https://arxiv.org/abs/2302.06675,
algorithm 2.
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor


def lion_(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Apply one step in place to `parameter` and `exp_avg`; all three tensors have one shape."""
    update = exp_avg.lerp(grad, 1 - beta1).sign_()
    parameter.mul_(1 - lr * weight_decay).sub_(update.mul_(lr))
    exp_avg.lerp_(grad, 1 - beta2)


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay. State: one momentum of the parameter's size.

    Every coordinate moves by `lr` at each step. So lr must be 3 to 10 times smaller than AdamW's,
    and weight_decay larger by the same factor (section 5 of the paper). Raises ValueError for a
    value out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; it must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; each must lie in [0, 1)")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient and return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError(
                        "Lion does not take sparse gradients. Use lazy_adamw, adagrad or sgd"
                    )
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                lion_(
                    parameter,
                    parameter.grad,
                    state["exp_avg"],
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=group["weight_decay"],
                )
        return loss
