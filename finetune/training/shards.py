"""The part of a checkpoint that an engine shards: each process writes what it holds.

It goes through torch.distributed.checkpoint. A checkpoint's files are trees of one shape for every
engine. In the place of a sharded tensor the tree has a hole, a meta tensor of the full shape. The
folder `shards/` has the content, with the place in the tree as its key
(`optimizer.pt/state/3/exp_avg`). Reading needs no process group: each process reads what it lacks,
its own part or, if nothing is sharded, all. So a run continues with any number of processes, under
any engine, and torch's own tools can read the folder
(https://docs.pytorch.org/docs/stable/distributed.checkpoint.html).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.distributed.sharding import is_shard, shard_like

SHARDS = "shards"

Place = tuple[Any, ...]  # the keys that lead to a leaf of a tree
Own = Callable[[Place], Any]  # the tensor that this process has for a place, if any


def take_out_shards(files: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return `files` with a hole in the place of each shard, and the shards."""
    shards: dict[str, Tensor] = {}

    def hole(place: Place, leaf: Any) -> Any:
        if not is_shard(leaf):
            return leaf
        shards[_key(place)] = leaf
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    return _mapped(files, hole), shards


def write_shards(folder: Path, shards: Mapping[str, Tensor]) -> None:
    """Write `shards` to `folder`, which all processes see. Every process must call it.

    Raises on every process the error of any: OSError if a disk refused.
    """
    import torch.distributed.checkpoint as dcp  # here: it takes a second to import

    class Writer(dcp.FileSystemWriter):
        def write_data(self, *args: Any) -> Any:
            with refusals_of_the_disk():
                return super().write_data(*args)

    try:
        dcp.save(dict(shards), storage_writer=Writer(folder))
    except dcp.CheckpointException as failure:  # not an Exception; it has those of all processes
        errors = [error for error, _ in failure.failures.values()]
        raise next(
            (error for error in errors if isinstance(error, OSError)), RuntimeError(str(failure))
        ) from failure


def put_in_shards(tree: Any, folder: Path, name: str, own: Own = lambda place: None) -> Any:
    """Return the `tree` of the file `name`, with its holes filled from `folder`.

    If `own` gives a shard, the tensor is cut as that shard is; else it is whole.
    """
    holes: dict[str, Any] = {}

    def fitted(place: Place, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        mine = own(place)
        sharded = is_shard(mine) and mine.shape == leaf.shape
        if not leaf.is_meta:
            return shard_like(mine, leaf) if sharded else leaf
        empty = (
            torch.empty_like(mine, dtype=leaf.dtype)
            if sharded
            else torch.empty_like(leaf, device="cpu")
        )
        return holes.setdefault(_key((name, *place)), empty)

    fitted_tree = _mapped(tree, fitted)
    if holes:
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            # As asked for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(holes, checkpoint_id=folder, no_dist=True)
    return fitted_tree


@contextmanager
def refusals_of_the_disk() -> Iterator[None]:
    """Raise the OSError that `torch.save` hides.

    It closes its archive on the way out, and an error of that hides the first one.
    """
    try:
        yield
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _mapped(tree: Any, change: Callable[[Place, Any], Any], place: Place = ()) -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change, (*place, key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(
            _mapped(value, change, (*place, index)) for index, value in enumerate(tree)
        )
    return change(place, tree)


def _key(place: Place) -> str:
    return "/".join(map(str, place))
