"""Row-sparse gradients: one entry a row.  Floor 1."""

import torch
from torch import Tensor


def coalesce(grad: Tensor) -> Tensor:
    """Return `grad` with the entries of each row summed, in float32 at least, and rows ascending.

    Accumulation appends, so gradients arrive with rows repeated; in bfloat16 a thousand repeats of 1.0 would sum to 256.  The
    result keeps float32 values for a gradient of lower precision that had to be summed.  (Waits for the device on CUDA.)
    """
    if grad.is_coalesced():
        return grad
    if grad.dtype in (torch.bfloat16, torch.float16):
        grad = torch.sparse_coo_tensor(
            grad._indices(), grad._values().float(), grad.shape, check_invariants=False
        )
    return grad.coalesce()
