"""Matrix products of 16-bit factors with results in float32: as a GPU hands them out, or by a copy.

Floor 1: torch only. `out_dtype` of `torch.mm` and `torch.addmm` is for CUDA alone (https://docs.pytorch.org/docs/stable/generated/torch.mm.html):
there float32 costs no pass over the result, and its sums are not rounded to 16 bits on the way.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from finetune.buffers import buffer


def widens(factor: Tensor) -> bool:
    """Whether a product with `factor` can be had in float32 though it is not."""
    return factor.device.type == "cuda" and factor.dtype in (torch.bfloat16, torch.float16)


def write_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, in the dtype of the factors or, where they can be widened, in float32."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif not isinstance(
        out, FakeTensor
    ):  # which holds no numbers, and whose stand-ins do not know `out_dtype`
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with `total` in the dtype of the factors or in float32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif widens(left):
        if not isinstance(total, FakeTensor):
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right, out=buffer("update", total.shape, left.dtype, left))
