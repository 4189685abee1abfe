"""An nn.Embedding whose rows are stepped lazily: its lookup gives them as dense AdamW would.

Registering an embedding with `LazyAdamW` changes the class of that one module, in place, to one
with `RowLookup` between it and nn.Embedding. Parameters, names and the module's identity stay. A
subclass whose forward calls `super().forward(ids)` (Gemma's scaled embedding) works unchanged. The
module can be deep-copied, pickled and saved as before. `weight` itself holds rows as they were last
stepped, so code that reads it directly must do so inside `LazyAdamW.flushed()`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.compute.subclass import derived_class
from finetune.optim.lazy.saved import check_witness, weight_was_loaded
from finetune.optim.lazy.state import Showing
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


class RowLookup(nn.Embedding):
    """The lookup below a registered embedding's own class; see the module's docstring."""

    row_table: RowTable
    was_sparse: bool
    original_class: type[nn.Embedding]

    def forward(self, input: Tensor) -> Tensor:
        table, weight = self.row_table, self.weight
        check_witness(table, weight)
        if table.weight_is_current:
            return F.embedding(input, weight, self.padding_idx, sparse=True)
        rows, inverse = torch.unique(input, return_inverse=True)
        keep = torch.is_grad_enabled()
        with torch.no_grad():
            current = table.read(weight, rows, step_follows=keep)
        return _Rows.apply(weight, current, rows, inverse, self.padding_idx)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        table = self.row_table
        check_witness(table, self.weight)
        if not (table.weight_is_current or table.showing is Showing.DEFERRED):
            destination[prefix + "weight"] = table.dense(self.weight.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict:
            with torch.no_grad():
                weight_was_loaded(self.row_table, self.weight)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        self.row_table.follow(self.weight)
        return self


def make_lazy(module: nn.Embedding, table: RowTable) -> None:
    """Make `module` look its rows up through `table` and give row-sparse gradients."""
    lazy: Any = module
    lazy.was_sparse, lazy.row_table, lazy.sparse = module.sparse, table, True
    cls: Any = type(module)
    bases = (RowLookup,) if cls is nn.Embedding else (cls, RowLookup)
    lazy.__class__ = derived_class(f"Lazy{cls.__name__}", bases, original_class=cls)


def make_plain(module: RowLookup) -> None:
    """Make `module` the embedding that it was before `make_lazy`."""
    plain: Any = module
    plain.__class__, plain.sparse = module.original_class, module.was_sparse
    del plain.row_table, plain.was_sparse
