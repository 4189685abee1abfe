"""The lookup of rows as of now, whose gradient is row-sparse."""

from typing import Any

import torch
from torch import Tensor

from finetune.optim.lazy.table import RowTable


class _Rows(torch.autograd.Function):
    """The lookup of distinct `rows` [u] in `weight`, whose values are `current` [u, d].

    The gradient of the weight is row-sparse.
    """

    @staticmethod
    def forward(
        weight: Tensor, current: Tensor, rows: Tensor, inverse: Tensor, padding_idx: int | None
    ) -> Tensor:
        return current[inverse]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        weight, _, rows, inverse, ctx.padding_idx = inputs
        ctx.save_for_backward(rows, inverse)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        rows, inverse = ctx.saved_tensors
        grad = grad_output.reshape(-1, ctx.shape[1])
        wide = grad if grad.dtype == torch.float64 else grad.float()
        values = torch.ops.aten.embedding_dense_backward(
            wide, inverse.reshape(-1), len(rows), -1, False
        )
        if ctx.padding_idx is not None:
            kept = rows != ctx.padding_idx
            rows, values = rows[kept], values[kept]
        sparse = torch.sparse_coo_tensor(
            rows[None], values.to(ctx.dtype), ctx.shape, is_coalesced=True, check_invariants=False
        )
        # Autograd copies a gradient that somebody else holds too. Of any other it takes over the
        # contents, without the mark that it is coalesced.
        ctx.kept = sparse
        return sparse, None, None, None, None


def look_up(table: RowTable, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Return the rows `ids` of a table as of now, as `torch.nn.functional.embedding` does.

    The gradient of `weight` is row-sparse. It is called while torch's functions do not go through
    `LazyRows`. Raises IndexError for an id or a padding_idx that the table does not have.
    """
    if padding_idx is not None:
        if not -len(weight) <= padding_idx < len(weight):
            raise IndexError(f"the embedding has {len(weight)} rows, and padding_idx {padding_idx}")
        padding_idx %= len(weight)
    rows, inverse = torch.unique(ids, return_inverse=True)
    on_cpu = (
        rows.device.type == "cpu"
    )  # another device reports it by itself, and would be waited for
    if on_cpu and len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < len(weight):
        raise IndexError(
            f"the embedding has {len(weight)} rows, but was asked for ids from {int(rows[0])} to "
            f"{int(rows[-1])}"
        )
    keep = torch.is_grad_enabled() and weight.requires_grad
    with table.lock:  # `current` may lie in memory that the next read overwrites
        with torch.no_grad():
            current = table.read(weight, rows, step_follows=keep)
        return _Rows.apply(weight, current, rows, inverse, padding_idx)
