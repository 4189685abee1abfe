"""Memory that a table works in, kept from step to step.

A CPU's allocator hands megabytes back to the system as soon as they are free, and fetches them
again page by page. A step over 2,048 rows took three times as long in fresh tensors as in these.
Other devices have allocators that keep memory, so they get fresh tensors.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

outlives_inference_mode = torch.inference_mode(False)
"""Decorator for functions that make tensors to be kept. An evaluation may be the first to ask for
them, and a tensor made in inference mode could not be written to later."""


class Block(NamedTuple):
    """Copies of parameters and moments of some rows, and three tensors to work in, each [k, d]."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    work: tuple[Tensor, ...]

    def part(self, part: slice) -> "Block":
        """Return the block of a slice of the rows; its `work` has room for as many rows."""
        start, stop, _ = part.indices(len(self.param))
        work = tuple(buffer[: stop - start] for buffer in self.work)
        return Block(self.param[part], self.exp_avg[part], self.exp_avg_sq[part], work)


class Memo(NamedTuple):
    """What a block still holds: `rows` [k], brought up to now by the forward of a training step.

    It holds as long as the table's step count and the weight's version are these.
    """

    rows: Tensor
    step: int
    version: int
    block: Block


class Scratch:
    """The block that one table works in; a copy of the table starts with an empty one.

    A thread that works in it holds its `lock`, and so does one that changes the table.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Give the memory back."""
        self.block: Block | None = None
        self.memo: Memo | None = None  # of the block's contents; forgotten when it is taken again

    def __reduce__(self) -> tuple:
        return Scratch, ()

    @outlives_inference_mode
    def take(self, count: int, work: int, like: Tensor) -> Block:
        """Return a block of `count` rows, with room to work on `work` of them.

        Its dtype, device and width are those of `like` [n, d]. What the block that was taken before
        held is lost.
        """
        self.memo = None
        on_cpu = like.device.type == "cpu"

        def rows(length: int, old: Tensor | None) -> Any:
            if old is not None and on_cpu and len(old) >= length and old.dtype == like.dtype:
                return old
            return torch.empty(length, like.shape[1], dtype=like.dtype, device=like.device)

        old: Sequence[Tensor | None] = (
            [None] * 6 if self.block is None else [*self.block[:3], *self.block.work]
        )
        param, exp_avg, exp_avg_sq = (rows(count, tensor) for tensor in old[:3])
        block = Block(param, exp_avg, exp_avg_sq, tuple(rows(work, tensor) for tensor in old[3:]))
        if on_cpu:
            self.block = block
        return block.part(slice(count))
