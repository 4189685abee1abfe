"""Muon for the hidden matrices of a model and AdamW for everything else, as one optimizer.

Keller Jordan's Muon, https://kellerjordan.github.io/posts/muon/: embeddings, the output head, gains
and biases go to AdamW. One lr serves both rules, because the update of a matrix is scaled to
AdamW's root mean square (https://arxiv.org/abs/2502.16982, section 2.2).
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

_ADAMW_FIXED = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
}
_MUON_FIXED = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "eps": 1e-7}


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon over groups with `rule="muon"`, and torch.optim.AdamW over the others.

    There are one `param_groups`, one state and one state_dict, so any scheduler drives both. A
    group without a rule is Muon's if it holds only matrices. `betas`, `eps` and `fused` are
    AdamW's. `momentum`, `nesterov`, `ns_steps` and `adjust_lr_fn` are Muon's; the last is
    "match_rms_adamw", or "original" for Keller Jordan's scale, which needs an lr of its own. Raises
    ValueError for a value out of range, and for a parameter under Muon that is not a matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        for_muon: dict[str, Any] = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        for_adamw: dict[str, Any] = {"betas": betas, "eps": eps, "fused": fused}
        matrix = [torch.nn.Parameter(torch.zeros(2, 2))]
        torch.optim.Muon(matrix, **shared, **for_muon)  # torch's own checks of the values
        torch.optim.AdamW(matrix, **shared, **for_adamw)
        super().__init__(params, {**shared, **for_muon, **for_adamw})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        matrices = all(parameter.ndim == 2 for parameter in group["params"])
        rule = group.setdefault("rule", "muon" if matrices else "adamw")
        if rule not in ("muon", "adamw"):
            raise ValueError(f"the rule of a group is {rule!r}; it must be 'muon' or 'adamw'")
        if rule == "muon" and not matrices:
            raise ValueError(
                "a group under Muon holds a parameter that is not a matrix. Give it rule='adamw'"
            )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step of each rule over its groups and return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups(torch.optim.Muon, "muon", _MUON_FIXED)
        self._step_groups(torch.optim.AdamW, "adamw", _ADAMW_FIXED)
        return loss

    def _step_groups(
        self, optimizer: type[torch.optim.Optimizer], rule: str, fixed: dict[str, Any]
    ) -> None:
        """Let `optimizer` step the groups of this rule and write into this optimizer's state.

        It is made as unpickling makes one, from groups and state. So loads, copies and wrappers of
        this optimizer need no care. Its step is called without torch's hooks, which have seen this
        optimizer's step.
        """
        groups = [{**group, **fixed} for group in self.param_groups if group["rule"] == rule]
        engine = optimizer.__new__(optimizer)
        engine.__setstate__({"defaults": {}, "state": self.state, "param_groups": groups})
        getattr(optimizer.step, "__wrapped__", optimizer.step)(engine)
