"""The row-sparse gradients of lazily stepped tables, averaged over the processes as rows.

torch's DistributedDataParallel all-reduces a sparse gradient by a collective that NCCL does not
have (https://github.com/pytorch/pytorch/issues/22400), and raises if one process used no row of a
table. So the tables are kept out of it. Their gradients are averaged once a step, after
accumulation and before clipping, by dense collectives alone: all-gathers of counts and of ids, and
then an all-gather of the values or an all-reduce of the rows that any process used. The way that
costs fewer bytes is taken (`scripts/row_traffic.py` has the formula). No engine around the model is
needed: the same call serves a table that FSDP leaves alone.

Every process ends up with the same bits. Gathered rows are added in the order of the processes, and
each process's ids are distinct, so no atomic addition decides an order on a GPU. An all-reduce
gives all processes one result.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from finetune.optim import LazyAdamW
from finetune.optim.gradients import coalesce


def keep_tables_out_of_ddp(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have DistributedDataParallel, when it wraps `module`, ignore the tables stepped lazily.

    They are those of `optimizer`. `RowGradients` then handles their gradients, and their weights at
    the start.
    """
    tables = {id(weight) for weight in _tables(optimizer)}
    names = [
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if id(parameter) in tables
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


class RowGradients:
    """The average over the processes of the gradients of the tables that a LazyAdamW steps.

    Any other optimizer has no such tables. Every process makes one when the model is on its device:
    the tables become those of process 0. `say` gets one sentence, once, if a dense all-reduce is
    the cheaper way for the number of rows that the processes use.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer, *, say: Callable[[str], None]) -> None:
        self.optimizer, self._say = optimizer, say
        self._said = False
        self.num_processes = (
            dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        )
        if self.num_processes > 1:
            for weight in _tables(optimizer):
                dist.broadcast(weight.detach(), src=0)

    @torch.no_grad()
    def average(self) -> None:
        """Give every table the average gradient: coalesced, rows ascending, on every process.

        Every process must call this at every step, even if it used no row: its `grad` may be None.
        A table with None on all processes keeps None and is not stepped. Waits for the device twice
        for each table: for the counts and for the size of the union.
        """
        if self.num_processes == 1:
            return
        for weight in _tables(self.optimizer):
            # The optimizer refuses a dense gradient, with the reason.
            if weight.grad is None or weight.grad.is_sparse:
                weight.grad = self._averaged(weight)

    def _averaged(self, weight: Tensor) -> Tensor | None:
        rows, values = _own(weight)
        counts: list[int] = _gather(
            torch.tensor(-1 if weight.grad is None else len(rows), device=weight.device)
        ).tolist()
        most, counts = max(counts), [max(0, count) for count in counts]
        if most < 0:
            return None
        if most == 0:
            return _row_sparse(rows, values, weight)
        everybodys = (
            _gather_parts(rows, counts)
            if gathering_may_be_cheaper(self.num_processes, most, len(weight))
            else None
        )
        union = (
            _marked_anywhere(rows, len(weight))
            if everybodys is None
            else torch.unique(torch.cat(everybodys))
        )
        total = values.new_zeros(len(union), weight.shape[1])
        if everybodys is not None and gathering_is_cheaper(self.num_processes, most, len(union)):
            for part_rows, part in zip(everybodys, _gather_parts(values, counts)):
                total.index_add_(0, torch.searchsorted(union, part_rows), part)
        else:
            self._announce(weight, most, len(union))
            total.index_copy_(0, torch.searchsorted(union, rows), values)
            dist.all_reduce(total)
        return _row_sparse(union, total.div_(self.num_processes), weight)

    def _announce(self, weight: Tensor, most: int, union: int) -> None:
        if not self._said:
            self._said = True
            self._say(
                f"row gradients: {self.num_processes} processes used up to {most:,} rows each, "
                f"{union:,} together, of an embedding's {len(weight):,}. A dense all-reduce of "
                f"those {union:,} is cheaper here than gathering each process's rows. The choice "
                "is made at every step and reported only once."
            )


def gathering_is_cheaper(processes: int, most_rows: float, union_rows: float) -> bool:
    """Return whether to gather the values of rows sends at most what an all-reduce of them sends.

    `most_rows`: of one process; `union_rows`: of all.
    """
    return processes * most_rows <= 2 * union_rows


def gathering_may_be_cheaper(processes: int, most_rows: float, vocabulary: int) -> bool:
    """Return whether a union could be large enough for gathering to be cheaper.

    Only then is it worth knowing which process used which row.
    """
    return gathering_is_cheaper(processes, most_rows, union_rows=vocabulary)


def _tables(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    return list(inner.registered_weights().values()) if isinstance(inner, LazyAdamW) else []


def _own(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return this process's rows [n] int32, ascending, and their gradients [n, d], as sent.

    The gradients are in float32 at least, for any dtype of the weight.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.grad is None:
        rows = weight.new_empty(0, dtype=torch.int32)
        return rows, weight.new_empty(0, weight.shape[1], dtype=dtype)
    grad = coalesce(weight.grad)
    return grad.indices()[0].int(), grad.values().to(dtype)


def _gather(own: Tensor) -> Tensor:
    """Return the tensors of all processes, [P, ...]."""
    # torch 2.13 renamed it.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    everybodys = own.new_empty(dist.get_world_size(), *own.shape)
    all_gather(everybodys.view(-1), own.contiguous().view(-1))
    return everybodys


def _gather_parts(own: Tensor, counts: list[int]) -> list[Tensor]:
    """Return the tensors of all processes, of which the p-th has counts[p] rows."""
    padding = [0, 0] * (own.ndim - 1) + [0, max(counts) - len(own)]
    return [part[:count] for part, count in zip(_gather(pad(own, padding)), counts)]


def _marked_anywhere(rows: Tensor, length: int) -> Tensor:
    """Return the rows that any process has, ascending, by a mark for each of `length` rows."""
    marks = rows.new_zeros(length, dtype=torch.uint8).index_fill_(0, rows.long(), 1)
    dist.all_reduce(marks, op=dist.ReduceOp.MAX)
    return marks.nonzero()[:, 0].int()


def _row_sparse(rows: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    values = values.to(weight.dtype)
    return torch.sparse_coo_tensor(
        rows[None].long(), values, weight.shape, is_coalesced=True, check_invariants=False
    )
