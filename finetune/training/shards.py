"""The part of a checkpoint that an engine shards: each process writes what it holds.

It goes through torch.distributed.checkpoint. A checkpoint's files are trees of one shape for every
engine. In the place of a sharded tensor the tree has a hole, a meta tensor of the full shape. The
folder `shards/` has the content, with the place in the tree as its key
(`optimizer.pt/state/3/exp_avg`). Reading needs no process group: each process reads what it lacks,
its own part or, if nothing is sharded, all. So a run continues with any number of processes, under
any engine, and torch's own tools can read the folder
(https://docs.pytorch.org/docs/stable/distributed.checkpoint.html).
"""

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.distributed.sharding import is_shard, shard_like
from finetune.errors import Border, UserError, reason_of

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

        _check_metadata(folder)
        with warnings.catch_warnings(), Border(f"{folder} cannot be read"):
            # As asked for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.load(holes, checkpoint_id=folder, no_dist=True)
            except dcp.CheckpointException as failure:  # it is no Exception
                raise UserError(
                    f"{folder} cannot be read: {reason_of(failure)}. Take another checkpoint"
                ) from failure
    return fitted_tree


class _Metadata(pickle.Unpickler):
    """A reader of torch's `.metadata`, a pickle, that makes nothing but what torch writes there."""

    ALLOWED = {  # noqa: RUF012
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the class. Raises UserError for any other."""
        home = module.removesuffix("._local")  # pathlib's, in Python 3.13
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in self.ALLOWED.get(home, ()):
            raise UserError(
                f"the .metadata of a checkpoint asks for {module}.{name}, which torch never writes "
                "there. Take another checkpoint"
            )
        return super().find_class(module, name)


def _check_metadata(folder: Path) -> None:
    """Raise UserError if a file that torch will unpickle could run code, or names other folders."""
    found = sorted(folder.glob("*.metadata"))
    for path in found:
        with (
            Border(f"{path} cannot be read", do="Take another checkpoint"),
            path.open("rb") as file,
        ):
            metadata = _Metadata(file).load()
        infos = (getattr(metadata, "storage_data", None) or {}).values()
        if any(Path(info.relative_path).name != info.relative_path for info in infos):
            raise UserError(f"{path} names files outside of {folder}. Take another checkpoint")
    if not found:
        raise UserError(f"{folder} lacks .metadata. Take another checkpoint")


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
