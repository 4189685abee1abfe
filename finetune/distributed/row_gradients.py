"""The row-sparse gradients of lazily stepped tables, averaged over the processes as rows.

Floor 2 (torch.distributed).  torch's DistributedDataParallel all-reduces a sparse gradient by a collective that NCCL does not have
(https://github.com/pytorch/pytorch/issues/22400), and raises where one process used no row of a table.  So the tables are kept out
of it, and their gradients are averaged once a step, after accumulation and before clipping, by dense collectives alone: all-gathers
of counts, of ids, and then, whichever costs fewer bytes (wire.py has the formula), an all-gather of the values or an all-reduce of
the rows that any process used.  It needs no engine around the model: the same call serves a table that FSDP leaves alone.

Every process ends up with the same bits: gathered rows are added in the order of the processes, each process's ids being distinct
(so no atomic addition decides an order on a GPU), and an all-reduce hands everybody one result.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from finetune.distributed.wire import gathering_is_cheaper, gathering_may_be_cheaper
from finetune.optim import LazyAdamW
from finetune.optim.gradients import coalesce


def keep_tables_out_of_ddp(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have DistributedDataParallel, when it comes to wrap `module`, leave alone the tables that `optimizer` steps lazily.

    Their gradients, and their weights at the start, are `RowGradients`' business then.
    """
    tables = {id(weight) for weight in _tables(optimizer)}
    names = [
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if id(parameter) in tables
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


class RowGradients:
    """Averages the gradients of the tables that a LazyAdamW steps over the processes; of any other optimizer there are none.

    To be made by every process when the model is on its device: the tables become those of process 0.  `say` is told once if, for
    the number of rows that the processes use, a dense all-reduce is the cheaper way.
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
        """Give every table the average gradient: coalesced, rows ascending, the same bits on every process.

        Every process calls it at every step, also one that used no row (its `grad` may be None; a table with None everywhere keeps
        it and is not stepped).  Waits for the device twice a table, for the counts and for the size of the union.
        """
        if self.num_processes == 1:
            return
        for weight in _tables(self.optimizer):
            if (
                weight.grad is None or weight.grad.is_sparse
            ):  # the optimizer refuses a dense one, with the reason
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
                f"row gradients: {self.num_processes} processes used up to {most:,} rows each, {union:,} together, of an "
                f"embedding's {len(weight):,}: a dense all-reduce of those {union:,} costs less than sending each process's rows "
                f"to all, so it is done; which costs less is decided at each step, and said only now"
            )


def _tables(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    return list(inner.registered_weights().values()) if isinstance(inner, LazyAdamW) else []


def _own(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n] int32, ascending, and their gradients [n, d], as they are sent: in float32 at least, whatever the weight is in."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.grad is None:
        return weight.new_empty(0, dtype=torch.int32), weight.new_empty(
            0, weight.shape[1], dtype=dtype
        )
    grad = coalesce(weight.grad)
    return grad.indices()[0].int(), grad.values().to(dtype)


def _gather(own: Tensor) -> Tensor:
    """The tensors of all processes, [P, ...]."""
    all_gather = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )  # torch 2.13 renamed it
    everybodys = own.new_empty(dist.get_world_size(), *own.shape)
    all_gather(everybodys.view(-1), own.contiguous().view(-1))
    return everybodys


def _gather_parts(own: Tensor, counts: list[int]) -> list[Tensor]:
    """The tensors of all processes, of which the p-th has counts[p] rows."""
    padding = [0, 0] * (own.ndim - 1) + [0, max(counts) - len(own)]
    return [part[:count] for part, count in zip(_gather(pad(own, padding)), counts)]


def _marked_anywhere(rows: Tensor, length: int) -> Tensor:
    """The rows that any process has, ascending, by a mark for each of so many."""
    marks = rows.new_zeros(length, dtype=torch.uint8).index_fill_(0, rows.long(), 1)
    dist.all_reduce(marks, op=dist.ReduceOp.MAX)
    return marks.nonzero()[:, 0].int()


def _row_sparse(rows: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    values = values.to(weight.dtype)
    return torch.sparse_coo_tensor(
        rows[None].long(), values, weight.shape, is_coalesced=True, check_invariants=False
    )
