"""Matrix products of 16-bit factors with results in float32, and memory kept for large results.

`out_dtype` of `torch.mm` and `torch.addmm` exists for CUDA alone
(https://docs.pytorch.org/docs/stable/generated/torch.mm.html). A float32 result costs no extra pass
there, and its sums are not rounded to 16 bits on the way. On a CPU the result is copied.

Buffers. A CPU's allocator returns large blocks to the system as soon as they are free. It then
fetches them again page by page, each filled with zeros: half of the time of the loss over 262,144
tokens. So `buffer` keeps the memory from step to step. (`LOG.md` has why glibc is not set to keep
all freed memory.) Other devices have allocators that keep memory.
"""

import ctypes
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_kept = threading.local()
_rehearsed = threading.local()  # the same for fake tensors, whose memory is only counted


def widens(factor: Tensor) -> bool:
    """Return whether a product with the 16-bit `factor` can be had in float32."""
    return factor.device.type == "cuda" and factor.dtype in (torch.bfloat16, torch.float16)


def write_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right to `out`, in the dtype of the factors or, if they `widens`, in float32."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    # A fake tensor holds no numbers, and torch's fake products do not know `out_dtype`.
    elif not isinstance(out, FakeTensor):
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which is in the dtype of the factors or in float32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif widens(left):
        if not isinstance(total, FakeTensor):
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right, out=buffer("update", total.shape, left.dtype, left))


def buffer(name: str, shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return an uninitialised tensor on the device of `like`.

    On a CPU it takes the memory of the last buffer of this name and thread, if that is large
    enough. What the last buffer held is then lost.
    """
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=like.device)
    size = math.prod(shape) * dtype.itemsize
    place = _rehearsed if isinstance(like, FakeTensor) else _kept
    memory = getattr(place, name, None)
    if memory is None or len(memory) < size:
        # An evaluation may be the first to ask, and training cannot write to its tensors later.
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=torch.uint8)
        setattr(place, name, memory)
    return memory[:size].view(dtype).view(shape)


def release() -> None:
    """Free the memory that this thread keeps, for example because smaller results follow."""
    _kept.__dict__.clear()
    _rehearsed.__dict__.clear()


def return_freed_memory() -> None:
    """Give the pages that are free in glibc's heap back to the system. Elsewhere nothing is done.

    A training step leaves many free blocks between blocks in use. What comes next asks for other
    sizes, which do not fit into them (https://man7.org/linux/man-pages/man3/malloc_trim.3.html).
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def rehearsed_bytes() -> int:
    """Return the bytes that this thread would keep after what it did with fake tensors."""
    return sum(len(memory) for memory in _rehearsed.__dict__.values())


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` in `dtype`: the tensor itself, or a copy in the buffer of this name."""
    if tensor.dtype == dtype:
        return tensor
    return buffer(name, tensor.shape, dtype, tensor).copy_(tensor)
