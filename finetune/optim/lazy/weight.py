"""The weight of a registered embedding as other code sees it: rows as of now, and no write is lost.

Registering an embedding changes the class of its weight, in place, to `LazyRows`. torch then hands
every function that is called on the weight, or on a view of it, to `LazyRows.__torch_function__`:

- What does not ask for values (shape, grad, hooks ...) is answered as for any parameter.
- A view (`data`, `detach`, a slice ...) stays a view of the weight and is again a `LazyRows`.
- What means the weight's place in the graph (torch.autograd.grad ...) is given the weight itself.
- A write is a write to rows as of now: the table is flushed before it, and notes it afterwards.
- Anything else reads. It is given a copy of the rows as of now, and nothing is stored.

A copy or pickle of a `LazyRows` is a plain tensor of rows as of now. The optimizer and the lookup
work on the memory itself (`table.stored`), so none of this is in the way of a training step.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.errors import UserError
from finetune.optim.lazy.functions import (
    IDENTITIES,
    MEMORY,
    NOT_ABOUT_VALUES,
    PROPERTY,
    VIEWS,
    is_collective,
    name_of,
    written_by,
)
from finetune.optim.lazy.lookup import look_up
from finetune.optim.lazy.saved import (
    awaits_its_weight,
    check_replacement,
    check_weight,
    weight_was_written,
)
from finetune.optim.lazy.table import RowTable, stored

_Function = Callable[..., Any]
_Make = Callable[[Tensor], Tensor]


class LazyRows(torch.Tensor):
    """The weight [V, d] of a registered embedding, or a view of it; see the module's docstring."""

    _is_param: bool
    row_table: RowTable  # of the weight itself
    base: "LazyRows | None" = None  # of a view: the weight
    make: _Make = staticmethod(lambda weight: weight)  # what makes the view from the weight
    copied: tuple | None = None  # the moment whose rows are in memory of the view's own, if any

    @classmethod
    def __torch_function__(
        cls, func: _Function, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs, name = kwargs or {}, name_of(func)
        with torch._C.DisableTorchFunctionSubclass():
            if func in IDENTITIES:
                values = {IDENTITIES[func]: _replaced(kwargs.get(IDENTITIES[func]), _current)}
                return func(*args, **{**kwargs, **values})
            if targets := _found(written_by(func, name, args, kwargs)):
                return _write(func, args, kwargs, targets, sets_data=name == "data=")
            if name in MEMORY:
                _warn_of_memory(args[0])
            if name in VIEWS:
                views = _views(func, args, kwargs)
                return _read(func, args, kwargs) if views is None else views
            if func.__name__ in PROPERTY or name in NOT_ABOUT_VALUES or name in MEMORY:
                return func(*args, **kwargs)
            return _read(func, args, kwargs)

    def __format__(self, format_spec: str) -> str:
        return format(self._plain(torch.Tensor.detach), format_spec)

    def __deepcopy__(self, memo: dict) -> Tensor:
        memo[id(self)] = copied = self._plain(torch.clone)
        return copied

    def __reduce_ex__(self, protocol) -> str | tuple:
        with torch.no_grad():
            return self._plain(torch.Tensor.detach).__reduce_ex__(protocol)

    def _plain(self, copy: _Make) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            values = copy(_current(self).detach()).as_subclass(torch.Tensor)
            if getattr(self, "_is_param", False):
                return nn.Parameter(values, self.requires_grad)
            return values.requires_grad_(self.requires_grad)


class _Connected(torch.autograd.Function):
    """The values of `current`, whose gradient is that of `weight`."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, current: Tensor) -> Tensor:
        return current.view_as(current)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple:
        return grad_outputs[0], None


def watch(weight: Tensor, table: RowTable) -> None:
    """Let `weight` show the rows of `table` as of now to all other code."""
    weight.__class__ = LazyRows
    assert isinstance(weight, LazyRows)
    weight._is_param, weight.row_table = True, table


def unwatch(weight: Tensor) -> None:
    """Make `weight` the plain parameter that it was before `watch`, if it is not one already."""
    if isinstance(weight, LazyRows):
        del weight._is_param, weight.row_table
        weight.__class__ = nn.Parameter  # type: ignore[assignment]


def table_of(weight: Tensor) -> RowTable | None:
    """Return the table whose rows `weight` shows, if it shows any."""
    return weight.__dict__.get("row_table")


def shown(weight: Tensor, rows: Tensor) -> Tensor:
    """Return `rows`, a copy of all rows of `weight` as of now, as a view of it.

    It can be written like one. Its memory is its own, for code that saves by reading memory.
    """
    assert isinstance(weight, LazyRows)
    return _view_of(weight, rows, stored, copied=_moment(weight))


# The rest is called while torch's functions do not go through `LazyRows`.


def _weight(rows: LazyRows) -> LazyRows:
    return rows if rows.base is None else rows.base


def _view_of(
    rows: LazyRows, memory: Tensor, make: _Make, *, copied: tuple | None = None
) -> LazyRows:
    # `as_subclass` would add a node to the graph. Other code finds the weight's own node by a view.
    memory.__class__ = LazyRows
    assert isinstance(memory, LazyRows)
    memory.base, memory.make, memory.copied = _weight(rows), make, copied or rows.copied
    return memory


def _moment(weight: LazyRows) -> tuple | None:
    """Return what changes whenever rows as of now do."""
    table = table_of(weight)
    return None if table is None else table.moment(weight)


def _current(rows: LazyRows) -> Tensor:
    """Return the values of a weight or a view with rows as of now. Stores nothing."""
    weight = _weight(rows)
    table = table_of(weight)
    if table is None:
        return rows if rows.copied is None else rows.make(weight)
    with table.lock, torch.inference_mode(False), torch.no_grad():
        check_weight(table, weight)
        if rows.copied is not None and rows.copied == _moment(weight):
            return rows
        dense = None if table.weight_is_current else table.dense_once(weight)
    if dense is None and rows.copied is None:
        return rows
    values = rows.make(weight if dense is None else dense)
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return values
    return _Connected.apply(rows, values.detach())


def _found(tree: object) -> list[LazyRows]:
    """Return every `LazyRows` in arguments, also inside lists, tuples and dicts."""
    if isinstance(tree, LazyRows):
        return [tree]
    if not isinstance(tree, list | tuple | dict):
        return []
    parts = tree.values() if isinstance(tree, dict) else tree
    return [rows for part in parts for rows in _found(part)]


def _replaced(tree: Any, replace: Callable[[LazyRows], Tensor]) -> Any:
    """Return arguments with every `LazyRows` in them replaced."""
    if isinstance(tree, LazyRows):
        return replace(tree)
    if isinstance(tree, dict):
        return {key: _replaced(value, replace) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_replaced(part, replace) for part in tree)
    return tree


def _write(
    func: _Function, args: tuple, kwargs: dict, targets: list[LazyRows], *, sets_data: bool
) -> object:
    """Apply `func`, which writes to `targets`, to rows as of now."""
    weights = list({id(weight): weight for weight in map(_weight, targets)}.values())
    if sets_data:
        rows, data = args[0], _replaced(args[1], _current)
        if rows.base is not None:  # given other memory, it is no view of the weight any more
            rows.__class__ = nn.Parameter if getattr(rows, "_is_param", False) else torch.Tensor
            rows.data = data
            return None
        check_replacement(rows.row_table, data)
    if func.__name__ == "irecv":
        raise UserError(
            "torch.distributed's irecv writes later, so it cannot write to an embedding whose rows "
            "are stepped lazily. Use recv, or receive into another tensor and copy it"
        )
    with torch.no_grad():
        for weight in weights:
            if table := table_of(weight):
                with table.lock:
                    if not awaits_its_weight(table, weight):
                        check_weight(table, weight)
                        table.flush(weight)
    memory = {id(rows): rows.make(_weight(rows)) for rows in targets}

    def of(rows: LazyRows) -> Tensor:
        return memory[id(rows)] if id(rows) in memory else _current(rows)

    result: Any = func(*_replaced(args, of), **_replaced(kwargs, of))
    if is_collective(func) and kwargs.get("async_op") and result is not None:
        result.wait()  # until then it may not have written
    with torch.no_grad():
        for weight in weights:
            if table := table_of(weight):
                weight_was_written(table, stored(weight))
        for rows in targets:
            if rows.copied is not None:
                rows.as_subclass(torch.Tensor).copy_(memory[id(rows)])
                rows.copied = _moment(_weight(rows))
    return next((rows for rows in targets if memory[id(rows)] is result), result)


def _views(func: _Function, args: tuple, kwargs: dict) -> object:
    """Return what `func` makes of a `LazyRows`, if that is a view or several; else None."""
    rows = args[0] if args else None
    if not isinstance(rows, LazyRows):
        return None
    made = func(*args, **kwargs)
    if made is rows or isinstance(made, str):
        return made
    return _as_views(made, rows, lambda weight: func(rows.make(weight), *args[1:], **kwargs))


def _as_views(
    made: object, rows: LazyRows, make: _Function, values: Tensor | None = None
) -> object:
    """Return tensors over the memory of `rows` as views, which `make` makes from a weight.

    Returns None if they lie elsewhere. `values`: the copy of rows as of now over which they lie.
    """
    parts: list = list(made) if isinstance(made, list | tuple) else [made]
    over = _address(rows if values is None else values)
    if not all(isinstance(part, Tensor) and _address(part) == over for part in parts) or not parts:
        return None
    copied = None if values is None or values is rows else _moment(_weight(rows))
    if values is not None:  # what a function returns may be its argument
        parts = [part.as_subclass(LazyRows) for part in parts]
    if isinstance(made, Tensor):
        return _view_of(rows, parts[0], make, copied=copied)
    views = (
        _view_of(rows, part, lambda weight, i=i: make(weight)[i], copied=copied)  # type: ignore[misc]
        for i, part in enumerate(parts)
    )
    return tuple(views) if isinstance(made, tuple) else list(views)


def _address(tensor: Tensor) -> int | None:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    has_memory = tensor.layout is torch.strided and tensor.numel() and not wrapped
    return tensor.untyped_storage().data_ptr() if has_memory else None


def _read(func: _Function, args: tuple, kwargs: dict) -> object:
    """Return what `func` makes of rows as of now.

    Raises UserError if it writes to them, since what it wrote would be lost.
    """
    if func is F.embedding and _looks_up(*args, **kwargs):
        return look_up(args[1].row_table, args[1], args[0], kwargs["padding_idx"])
    copies: list[tuple[LazyRows, Tensor, int]] = []

    def of(rows: LazyRows) -> Tensor:
        values = _current(rows)
        copies.append((rows, values, _version(values)))
        return values

    made: Any = func(*_replaced(args, of), **_replaced(kwargs, of))
    for rows, values, version in copies:
        if _version(values) != version and _address(values) != _address(rows):
            if table := table_of(_weight(rows)):
                table.seen = None
            raise UserError(
                f"torch's function {func.__name__!r} wrote to a copy of an embedding whose rows "
                "are stepped lazily, so the write was lost. Call `optimizer.flush()` before it"
            )
    if func.__name__ in ("numpy", "__array__"):
        made.setflags(write=False)  # a write would be lost
    if len(copies) == 1 and isinstance(made, Tensor | list | tuple):  # a view that is not in VIEWS
        rows, values, _ = copies[0]

        def make(weight: Tensor) -> object:
            def this(_: LazyRows) -> Tensor:
                return rows.make(weight)

            return func(*_replaced(args, this), **_replaced(kwargs, this))

        views = _as_views(made, rows, make, values)
        return made if views is None else views
    return made


def _version(values: Tensor) -> int:
    return 0 if values.is_inference() else values._version


def _looks_up(ids: Tensor, weight: Tensor, **options: object) -> bool:
    """Return whether `torch.nn.functional.embedding` is called with the weight of a table."""
    table = None if isinstance(ids, LazyRows) else table_of(weight)
    if table is None:
        return False
    check_weight(table, stored(weight))
    return options["max_norm"] is None and not options["scale_grad_by_freq"]


def _warn_of_memory(rows: LazyRows) -> None:
    weight = _weight(rows)
    table = table_of(weight)
    if table is None or table.weight_is_current or table.warned or rows.copied == _moment(weight):
        return
    table.warned = True
    warnings.warn(
        "the memory of an embedding whose rows are stepped lazily was asked for, and some of its "
        "rows are not up to date. Read it inside `with optimizer.flushed():`",
        stacklevel=3,
    )
