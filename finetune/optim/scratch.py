"""Memory in which rows are gathered and worked on, kept from step to step.  Floor 1.

A CPU's allocator hands megabytes back to the system as soon as they are free and fetches them again page by page: a step over 2,048
rows took three times as long in fresh tensors as in these.  Other devices have allocators that keep memory, and get fresh tensors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Copies of parameters, first and second moments of some rows, and three tensors to work in, each [k, d]."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    work: tuple[Tensor, ...]

    def part(self, part: slice) -> "Block":
        """Return the block of a slice of the rows; `work` has room for as many, and holds nothing."""
        start, stop, _ = part.indices(len(self.param))
        work = tuple(buffer[: stop - start] for buffer in self.work)
        return Block(self.param[part], self.exp_avg[part], self.exp_avg_sq[part], work)


class Scratch:
    """The block that one table works in; a copy of the table starts with an empty one."""

    def __init__(self) -> None:
        self.block: Block | None = None
        self.memo: Any = (
            None  # what the block holds, for its owner to say; forgotten when it is taken again
        )

    def __reduce__(self) -> tuple:
        return Scratch, ()

    @torch.inference_mode(
        False
    )  # an evaluation may be the first to ask, and its tensors could not be written to later
    def take(self, count: int, work: int, like: Tensor) -> Block:
        """Return a block of `count` rows, with room to work on `work` of them, of the dtype, device and width of `like` [n, d].

        What the block taken before held is lost.
        """

        self.memo = None

        def rows(length: int, old: Tensor | None) -> Any:
            keep = (
                old is not None
                and like.device.type == "cpu"
                and len(old) >= length
                and old.dtype == like.dtype
            )
            return (
                old
                if keep
                else torch.empty(length, like.shape[1], dtype=like.dtype, device=like.device)
            )

        old: Sequence[Tensor | None] = (
            [None] * 6 if self.block is None else [*self.block[:3], *self.block.work]
        )
        param, exp_avg, exp_avg_sq = (rows(count, tensor) for tensor in old[:3])
        buffers = tuple(rows(work, tensor) for tensor in old[3:])
        block = Block(param, exp_avg, exp_avg_sq, buffers)
        if like.device.type == "cpu":
            self.block = block
        return block.part(slice(count))
