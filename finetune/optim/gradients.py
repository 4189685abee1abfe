"""Row-sparse gradients: one entry a row, and clipping them together with dense ones.

torch.nn.utils.clip_grad_norm_ refuses sparse gradients. The norm of one that is not coalesced would
be wrong: a row that occurs twice would count twice instead of by its sum.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def coalesce(grad: Tensor) -> Tensor:
    """Return `grad` with the entries of each row summed, in float32 at least, and rows ascending.

    Accumulation appends, so gradients arrive with repeated rows. In bfloat16 a thousand repeats of
    1.0 would sum to 256, so a gradient of lower precision that had to be summed keeps float32
    values. On CUDA, summing waits for the device.
    """
    if grad.is_coalesced():
        return grad
    if grad.dtype in (torch.bfloat16, torch.float16):
        grad = torch.sparse_coo_tensor(
            grad._indices(), grad._values().float(), grad.shape, check_invariants=False
        )
    return grad.coalesce()


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients in place so that their norm as one vector is at most `max_norm`.

    Returns the norm before scaling. The result is that of torch.nn.utils.clip_grad_norm_ on the
    dense equivalents. A sparse gradient is coalesced (summed in float32 at least), and the
    coalesced one becomes `param.grad`. If an engine shards some gradients (DTensors), every process
    must call it, and the norm is that of the whole. Only coalescing, sharding and
    `error_if_nonfinite` wait for the device. The last raises RuntimeError for a norm that is not
    finite. `foreach` is torch's, and raises RuntimeError on a device that has no such kernels.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    dense: list[Tensor] = []  # parameters with a plain gradient
    plain: list[Tensor] = []  # those gradients, and the entries of row-sparse ones
    rows: list[Tensor] = []
    sharded: list[Tensor] = []
    for param in parameters:
        if param.grad is None:
            continue
        if param.grad.is_sparse:
            param.grad = coalesce(param.grad).to(param.dtype)
            rows.append(param.grad.values())
            # Of no entries there is no largest one, but the other rows are zero.
            plain.append(rows[-1] if rows[-1].numel() else rows[-1].new_zeros(1))
        elif hasattr(param.grad, "full_tensor"):
            sharded.append(param.grad)
        else:
            dense.append(param)
            plain.append(param.grad)
    norm = torch.nn.utils.get_total_norm(plain, norm_type, error_if_nonfinite, foreach)
    if sharded:
        norm_of_sharded: Any = torch.nn.utils.get_total_norm(
            sharded, norm_type, error_if_nonfinite, foreach
        )
        norm = torch.linalg.vector_norm(
            torch.stack([norm_of_sharded.full_tensor(), norm.to(norm_of_sharded.device)]), norm_type
        )
    torch.nn.utils.clip_grads_with_norm_(dense, max_norm, norm, foreach)  # on CUDA few kernels
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for value in rows + sharded:
        value.mul_(scale.to(value.device))
    return norm
