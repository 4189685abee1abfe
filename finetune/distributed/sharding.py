"""A model whose parameters an engine (FSDP2) shards over the processes.

A shard is a DTensor: the part of a parameter that this process has, with a description of the whole
(https://docs.pytorch.org/docs/stable/distributed.tensor.html,
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_shard(value: Any) -> bool:
    """Return whether `value` is a tensor that is only in part on this process."""
    return hasattr(value, "full_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Return whether any parameter is only in part on this process."""
    return any(is_shard(parameter) for parameter in model.parameters())


def shard_like(own: Any, full: Tensor) -> Tensor:
    """Return this process's shard of `full`, which every process has, cut as `own` is."""
    from torch.distributed.tensor import distribute_tensor  # here: it takes a second to import

    return distribute_tensor(
        full.to(own.device), own.device_mesh, own.placements, src_data_rank=None
    )


@contextmanager
def whole(model: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """Give every process the whole of a model that FSDP2 shards, for a while.

    Each can then run it on its own. Generation needs this: the processes have answers of different
    lengths, and a forward through shards takes all of them. Every process must enter the context,
    and its first forward must be that of `model` itself. `reshard_after_forward`: the setting of
    the engine for the parts below the root.
    """
    from torch.distributed.fsdp import FSDPModule  # here: it takes a second to import

    parts: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        # The order of the forwards here differs between processes. It must not guide the next
        # backward.
        parts[0].reset_iter_state()
        for part in parts:
            part.reshard()
            # For the root, torch's default is False.
            part.set_reshard_after_forward(
                reshard_after_forward and part is not model, recurse=False
            )
