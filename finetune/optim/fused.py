"""torch's fused kernel, chosen if it pays and left if it would be wrong.

torch 2.13's kernel for the CPU walks over memory as it lies. It never reads strides, and of shapes
only the parameter's. So it gives a wrong result, without a word, if a parameter, its gradient and
its state are laid out unlike each other. `backward` lays gradients out as parameters are, but
`torch.autograd.grad` does not, and `model.to(memory_format=...)` changes parameters after their
state was made.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.optim.registry import OptimizerInfo

_logger = logging.getLogger("finetune")


def can_fuse(
    info: OptimizerInfo, options: Mapping[str, object], groups: list[dict[str, Any]]
) -> bool:
    """Return whether torch's fused kernel pays here, and is right.

    It is if no other kernel was asked for and every parameter is a contiguous float.
    """
    if not info.fused_pays or options.keys() & {"fused", "foreach", "capturable", "differentiable"}:
        return False
    parameters = [
        item[1] if isinstance(item, tuple) else item for group in groups for item in group["params"]
    ]
    return all(
        p.is_floating_point() and p.is_contiguous() and p.device.type in ("cpu", "cuda")
        for p in parameters
    )


def leave_fused_when_wrong(optimizer: torch.optim.Optimizer) -> None:
    """Make `optimizer` check before each step that its fused kernel is right.

    If it is not, the group loses `fused` for good, and the log of "finetune" reports it. A step
    raises UserError if this happens under a GradScaler, which has left the scaling to the kernel.
    It also raises UserError for a state of another shape, which torch's load_state_dict takes.
    torch leaves hooks behind when an optimizer object is itself copied or pickled, this one too.
    """
    optimizer.register_step_pre_hook(_check_step)


def _check_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Check the layouts now or, if a closure computes the gradients, after it."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _check_layouts(optimizer)
        return None

    def checked() -> Any:
        loss = closure()
        _check_layouts(optimizer)
        return loss

    return args[:1], {**kwargs, "closure": checked}


def _check_layouts(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if not group.get("fused") or group.get("rule") == "muon":  # whose rule has no such kernel
            continue
        if all(_laid_out_alike(param, optimizer.state.get(param, {})) for param in group["params"]):
            continue
        if getattr(optimizer, "found_inf", None) is not None:
            raise UserError(
                "the optimizer is fused, and under a GradScaler it cannot step a parameter whose "
                "gradient or state is laid out unlike it in memory. Build it with fused=False"
            )
        group["fused"] = None  # torch then chooses among its other kernels
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        _logger.info(
            "%s goes on without torch's fused kernel, which is slower: a parameter, its gradient "
            "and its state are laid out unlike each other in memory",
            type(optimizer).__name__,
        )


def _laid_out_alike(param: Tensor, state: Mapping[str, object]) -> bool:
    """Return whether the kernel, which walks over all of these tensors side by side, is right.

    Raises UserError for a state of another shape, on which the kernel would leave its memory.
    """
    if param.grad is None or param.grad.layout is not torch.strided:  # torch refuses a sparse one
        return True
    moments = [t for key, t in state.items() if key != "step" and isinstance(t, Tensor)]
    for moment in moments:
        if moment.shape != param.shape:
            raise UserError(
                f"the optimizer's state of a parameter {list(param.shape)} has moments of "
                f"{list(moment.shape)}. Load the state that was saved with this model"
            )
    walked = [param, param.grad, *moments]
    if all(tensor.is_contiguous() for tensor in walked):
        return True
    dense = torch.empty_like(param, device="meta").stride()  # unlike that of memory with gaps
    return all(tensor.stride() == dense for tensor in walked)
