"""Memory for the largest intermediate results, kept from step to step.

Floor 1: torch only. A CPU's allocator hands what is large back to the system as soon as it is free, and fetches it again page by
page, each filled with zeros: half of the time of the loss over 262,144 tokens. (To have glibc keep all that is freed is no way out:
`LOG.md`.) Other devices have allocators that keep memory.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_kept = threading.local()


def buffer(name: str, shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """An uninitialised tensor on the device of `like`; on a CPU the memory of the last one of this name and thread, where it is as
    large, so that what that one held is lost."""
    if like.device.type != "cpu" or isinstance(like, FakeTensor):
        return torch.empty(shape, dtype=dtype, device=like.device)
    size = math.prod(shape) * dtype.itemsize
    memory = getattr(_kept, name, None)
    if memory is None or len(memory) < size:
        with torch.inference_mode(
            False
        ):  # an evaluation may be the first to ask, and its tensors could not be written to later
            memory = torch.empty(size, dtype=torch.uint8)
        setattr(_kept, name, memory)
    return memory[:size].view(dtype).view(shape)


def release() -> None:
    """Hand back what this thread keeps, where what comes next is smaller."""
    _kept.__dict__.clear()


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`: itself, or a copy in the buffer of this name."""
    if tensor.dtype == dtype:
        return tensor
    return buffer(name, tensor.shape, dtype, tensor).copy_(tensor)
