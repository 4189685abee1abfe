"""An nn.Embedding whose rows are stepped lazily: its lookup gives them as dense AdamW would.

Registering an embedding with `LazyAdamW` changes the class of that one module, in place, to one
with `RowLookup` between it and nn.Embedding. Parameters, names and the module's identity stay. A
subclass whose forward calls `super().forward(ids)` (Gemma's scaled embedding) works unchanged. The
module can be saved as before, and `weight` shows rows as of now (see weight.py). A copy or pickle
of the module alone is a plain embedding with rows as of now. A copy of the optimizer makes the
modules that were copied with it lazy again.
"""

import copyreg
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.compute.subclass import derived_class
from finetune.errors import UserError
from finetune.optim.lazy.eligible import check_lookup, check_missed_steps, floats
from finetune.optim.lazy.lookup import look_up
from finetune.optim.lazy.saved import check_weight, follow, weight_was_loaded
from finetune.optim.lazy.state import Showing
from finetune.optim.lazy.table import RowTable, stored
from finetune.optim.lazy.weight import LazyRows, shown, table_of, unwatch, watch


class RowLookup(nn.Embedding):
    """The lookup below a registered embedding's own class; see the module's docstring."""

    row_table: RowTable
    was_sparse: bool
    original_class: type[nn.Embedding]

    @torch._disable_dynamo
    def forward(self, input: Tensor) -> Tensor:
        table, weight = self.row_table, self.weight
        check_lookup(self)
        if table_of(weight) is not table:  # given by torch.func.functional_call
            return self._look_up_in_another(input, weight)
        with torch._C.DisableTorchFunctionSubclass(), table.lock:
            check_weight(table, weight)
            # torch sums the gradients of repeated ids in another order if it makes them sparse.
            if table.weight_is_current and table.missed_steps != "replay":
                return F.embedding(input, weight, self.padding_idx, sparse=True)
            return look_up(table, weight, input, self.padding_idx)

    def _look_up_in_another(self, input: Tensor, weight: Tensor) -> Tensor:
        if getattr(self, "_is_replica", False):
            raise UserError(
                "torch.nn.DataParallel copies rows that are not up to date to the other devices. "
                "Use DistributedDataParallel for an embedding that is stepped lazily"
            )
        inner = weight  # a transform of torch.func wraps it
        while torch._C._functorch.is_functorch_wrapped_tensor(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
        if isinstance(inner, LazyRows) and inner is not weight:
            check_weight(self.row_table, inner)
        return F.embedding(input, weight, self.padding_idx)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        table, weight = self.row_table, stored(self.weight)
        with table.lock:
            check_weight(table, weight)
            if table.showing is Showing.DEFERRED:
                destination[prefix + "weight"] = weight
            elif not (table.weight_is_current or keep_vars):
                destination[prefix + "weight"] = shown(self.weight, table.dense(weight))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        if isinstance(state_dict.get(key), LazyRows):
            state_dict[key] = state_dict[key].clone()
        with torch._C.DisableTorchFunctionSubclass():
            super()._load_from_state_dict(state_dict, prefix, *args)
            if key in state_dict:
                with torch.no_grad():
                    weight_was_loaded(self.row_table, self.weight)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        with torch._C.DisableTorchFunctionSubclass():
            super()._apply(*args, **kwargs)
            follow(self.row_table, self.weight)
        return self


def make_lazy(module: nn.Embedding, table: RowTable) -> None:
    """Make `module` look its rows up through `table` and give row-sparse gradients."""
    lazy: Any = module
    lazy.was_sparse, lazy.row_table, lazy.sparse = module.sparse, table, True
    cls: Any = type(module)
    bases = (RowLookup,) if cls is nn.Embedding else (cls, RowLookup)
    lazy.__class__ = derived_class(
        f"Lazy{cls.__name__}", bases, original_class=cls, __reduce_ex__=_reduce_to_plain
    )
    watch(module.weight, table)


def make_plain(module: RowLookup) -> None:
    """Make `module` the embedding that it was before `make_lazy`."""
    plain: Any = module
    plain.__class__, plain.sparse = module.original_class, module.was_sparse
    del plain.row_table, plain.was_sparse
    unwatch(module.weight)


def _reduce_to_plain(module: RowLookup, protocol: Any) -> tuple:
    """Reduce a lazy module as the plain one that it was, whose weight copies as rows as of now."""
    plain = module.original_class.__new__(module.original_class)
    plain.__dict__.update(module.__dict__, sparse=module.was_sparse)
    del plain.__dict__["row_table"], plain.__dict__["was_sparse"]
    make, *rest = tuple(plain.__reduce_ex__(protocol))
    # pickle refuses `__newobj__` for an object of another class
    return _new if make is copyreg.__newobj__ else make, *rest  # type: ignore[attr-defined]


def _new(cls: type, *args: object) -> object:
    return cls.__new__(cls, *args)


def check_table(module: RowLookup, table: RowTable, group: dict | None) -> None:
    """Raise UserError if a registered embedding is not as it was registered.

    `group` is its weight's parameter group.
    """
    weight = module.weight
    if getattr(module, "row_table", None) is not table or (
        group is not None and table_of(weight) is not table
    ):
        raise UserError(
            "a registered embedding was released or given to another optimizer. Build a "
            "new optimizer"
        )
    if group is None:
        raise UserError(
            "the weight of a registered embedding is no longer among the optimizer's "
            "parameters: resizing or sharding the model replaced it. Build the optimizer "
            "afterwards, and keep registered embeddings out of FSDP"
        )


def check_can_step(weight: Tensor, group: dict[str, Any], missed_steps: str) -> None:
    """Raise UserError if a registered weight cannot be stepped, by its gradient or its options.

    A dense gradient that is zero everywhere is no reason: tools that only want a state take such a
    step (torch.distributed.checkpoint).
    """
    if weight.grad is not None and not weight.grad.is_sparse and weight.grad.any():
        raise UserError(
            "a registered embedding got a dense gradient: other code trains through its weight (a "
            "tied output head, a penalty on the weights), so every row is in use. Leave it out of "
            "`embeddings`"
        )
    lr = float(group["lr"])
    if not lr >= 0:
        raise UserError(
            f"lr must be at least 0, not {lr}. A schedule that ran one step too far may be the "
            "cause; end it at 0"
        )
    if lr * group["weight_decay"] >= 1:
        raise UserError(f"lr * weight_decay must be below 1, not {lr} * {group['weight_decay']}")
    check_missed_steps(missed_steps, floats(group["betas"]), group["eps"])


def check_others(params: Iterable[Tensor], tables: Container[Tensor]) -> None:
    """Raise UserError if a parameter that is no registered weight got a sparse gradient."""
    for param in params:
        if param.grad is not None and param.grad.is_sparse and param not in tables:
            raise UserError(
                "a parameter that is not a registered embedding got a sparse gradient. Name its "
                "module in `embeddings` if that is an nn.Embedding, and build any other with "
                "sparse=False"
            )
