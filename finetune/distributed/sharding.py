"""A model whose parameters an engine (FSDP2) shards over the processes: its state in full, and back.

Floor 2 (torch.distributed). A checkpoint has one format, that of one process, whatever wrote it: `gathered` makes full tensors of
the shards, `spread_weights` and `spread_optimizer` make the shards of this process of full tensors, so that a run can go on with
another number of processes or another engine. torch.distributed.checkpoint would write shard by shard, in a second format that only
this engine's runs could read; the price of one format is that each process holds the whole state in its main memory while process 0
saves or all resume, 12 bytes a parameter with AdamW (https://docs.pytorch.org/docs/stable/distributed.tensor.html,
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is only in part on this process."""
    return any(_is_shard(parameter) for parameter in model.parameters())


def gathered(tree: Any, *, keep: bool) -> Any:
    """`tree` (dicts and lists of tensors) with every shard replaced by the full tensor on the CPU; by None where `keep` is false.

    Every process has to call it, with the same tree: the processes give each other their shards, one tensor after the other.
    """
    if isinstance(tree, Mapping):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, keep=keep) for value in tree)
    if _is_shard(tree):
        full = tree.full_tensor()
        return full.cpu() if keep else None
    return tree


def spread_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full `weights` as `model.load_state_dict` takes them on this process."""
    own = model.state_dict()
    return {name: _shard_like(own[name], value) if name in own else value for name, value in weights.items()}


def spread_optimizer(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A full state dict as `optimizer.load_state_dict` takes it here: what has a parameter's shape is sharded as that is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: _shard_like(parameters[index], value)
            if isinstance(value, Tensor) and value.ndim and value.shape == parameters[index].shape
            else value
            for key, value in entries.items()
        }
        for index, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


@contextmanager
def whole(model: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """Within it every process holds the whole of a model that FSDP2 shards, and can read it for itself, for as long as it likes.

    Generating needs this: the processes have answers of different lengths, and a forward through shards is a joint act. Every
    process has to enter it; the first forward of all must be that of `model` itself. `reshard_after_forward`: what the engine was
    set to for the parts below the root.
    """
    from torch.distributed.fsdp import FSDPModule  # here: it takes a second to import

    parts: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        parts[0].reset_iter_state()  # the order of the forwards within, each process's own, must not guide the next backward
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(reshard_after_forward and part is not model, recurse=False)  # the root: torch's default


def _is_shard(value: Any) -> bool:
    return hasattr(value, "full_tensor")


def _shard_like(own: Tensor, full: Tensor) -> Tensor:
    if not _is_shard(own):
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = own.device_mesh, own.placements  # type: ignore[attr-defined]
    return distribute_tensor(full.to(own.device), mesh, placements, src_data_rank=None)  # every process has read the same file
