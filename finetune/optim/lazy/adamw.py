"""LazyAdamW: dense AdamW's result for embeddings whose rows cost time only when a batch uses them.

AdamW: I. Loshchilov and F. Hutter, https://arxiv.org/abs/1711.05101. This file is the
torch.optim.Optimizer; the package's docstring says where the rest is.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from finetune.errors import UserError
from finetune.optim.lazy.dense import step_dense
from finetune.optim.lazy.eligible import (
    check_embedding,
    check_group,
    check_lookup,
    check_missed_steps,
    check_mode,
    floats,
)
from finetune.optim.lazy.embedding import (
    RowLookup,
    check_can_step,
    check_others,
    check_table,
    make_lazy,
    make_plain,
)
from finetune.optim.lazy.saved import (
    check_moments,
    check_weight,
    deferred,
    flushed,
    restore_table,
    saved_state,
    seal,
)
from finetune.optim.lazy.state import RowState, Showing
from finetune.optim.lazy.table import RowTable, stored
from finetune.optim.lazy.weight import table_of


class LazyAdamW(Optimizer):
    r"""AdamW over dense parameters and, row by row, over the tables of registered embeddings.

    Dense AdamW moves every row of an embedding at every step. A row that the batch did not use
    still decays, and its momentum still moves it. LazyAdamW steps only the rows in the gradient,
    and makes up what the others missed when they are next read:

    - ``missed_steps="exact"``: as dense AdamW to rounding, at a constant cost for any number of
      missed steps. The reference is AdamW in float64; float32 rows stay as near to it as dense
      float32 AdamW does.
    - ``missed_steps="replay"``: one by one. Bitwise ``torch.optim.AdamW(foreach=False)`` in float32
      and float64, and slow.
    - ``missed_steps="skip"``: never. Unused rows are frozen: no drift, no decay. TensorFlow's
      LazyAdam and torch's SparseAdam do this. It **trains another model than AdamW does**.

    Reading rows is pure: whatever is read is rows as of now, and nothing is stored. So evaluating,
    logging or saving changes not one bit of the run; only ``step``, and what writes to a weight,
    does. This holds for the module's forward, for ``model.state_dict()``, for copies, and for
    ``embedding.weight`` itself: other code sees dense AdamW's rows there. Reading the whole weight
    costs one pass over the table each time; ``with optimizer.flushed():`` makes it once for a
    block, and ``optimizer.flush()`` for good. A copy or pickle of the model alone is a plain model.
    For a checkpoint that resumes bit by bit, take both state dicts inside ``with
    optimizer.deferred():``.

    A write to the weight is a write to rows as of now, and makes up every missed step first, for
    the whole table. A write through a ``detach()`` from before the optimizer is an error while rows
    lag, and ``data_ptr`` warns. What ``.data`` or numpy gave before, and the weight's storage, are
    beyond its sight. Threads may look rows up side by side, also beside a step.

    A table whose ``grad`` is None misses nothing: as in torch, the parameter is not stepped and its
    step count does not grow. A gradient without entries is a step. A dense gradient at a registered
    table is an error: every row is in use then, so rows are not worth telling apart. Changing lr or
    weight_decay between steps costs nothing; changing betas or eps flushes the table first. A
    resized embedding is a new table: flush, resize, and build a new optimizer.

    Weights may be float32 or float64. Registered tables in bfloat16 or float16 keep float32 master
    rows. (Dense parameters follow torch.optim.AdamW: their state has the parameter's dtype.) On
    CUDA the step waits for the device only to coalesce a gradient that is not coalesced, and when a
    table may have to grow. A tensor ``lr`` is read on the host. ``replay`` and the lookup's
    ``unique`` wait too.

    Args:
        params: parameters or parameter groups, as for torch's optimizers. A group may have its own
            ``embeddings``.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW. lr * weight_decay must be
            below 1 at every step.
        embeddings: nn.Embedding modules whose weights are among ``params``. If several share one
            weight, name them all.
        missed_steps: "exact", "replay" or "skip".

    Raises:
        UserError: an option is out of its range, or an embedding cannot be stepped lazily
            (max_norm, scale_grad_by_freq, frozen, complex, not among the parameters).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        embeddings: Iterable[nn.Embedding] = (),
        missed_steps: str = "exact",
    ) -> None:
        check_mode(missed_steps)
        self.missed_steps = missed_steps
        self._tables: list[tuple[RowLookup, RowTable]] = []
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
        )
        for module in embeddings:
            self._register(module)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs. Its modules are copied as plain ones, so rows go along."""
        tables = []
        for module, table in self._tables:
            rows = stored(module.weight) if table.aside is None else table.aside
            tables.append((module, table, rows.clone()))
        return {
            **super().__getstate__(),
            "missed_steps": self.missed_steps,
            "_tables": tables,
        }

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_tables" in state:
            self._tables = [(module, table) for module, table, _ in state["_tables"]]
            for module, table, rows in state["_tables"]:
                if isinstance(module, RowLookup):
                    continue  # a shallow copy shares it
                stored(module.weight).copy_(rows)
                make_lazy(module, table)
                table.version = stored(module.weight)._version
                if module.weight in self.state:
                    self.state[module.weight] = table.live
        elif hasattr(self, "_tables"):  # torch loads a state dict
            self._restore_tables()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its entry "embeddings", if any, holds the modules to register."""
        embeddings = param_group.get("embeddings", ())
        super().add_param_group(
            {key: value for key, value in param_group.items() if key != "embeddings"}
        )
        group = self.param_groups[-1]
        check_group(group)
        if any(param.is_complex() for param in group["params"]):
            raise UserError(
                "LazyAdamW does not take complex parameters. Use torch.optim.AdamW for them"
            )
        for module in embeddings:
            self._register(module)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one step and return the loss that `closure` returns, if it is given.

        `closure` computes the loss and the gradients anew. Raises UserError if a table cannot be
        stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch._C.DisableTorchFunctionSubclass():
            self._step()
        return loss

    def _step(self) -> None:
        groups = self._groups()
        tables = self._check_tables(groups)
        for module, _ in self._tables:
            check_lookup(module)
        for weight in tables:
            check_can_step(weight, groups[weight], self.missed_steps)
        check_others(groups, tables)
        if any(
            table.showing is Showing.FLUSHED and weight.grad is not None
            for weight, table in tables.items()
        ):
            raise UserError("no step can be taken inside `optimizer.flushed()`. Take it outside")
        self._begin_anew(groups)
        for group in self.param_groups:
            dense = []
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param in tables:
                    self._step_table(param, tables[param], group)
                else:
                    dense.append(param)
            step_dense(self.state, dense, group, fused=self.missed_steps != "replay")

    def _step_table(self, weight: Tensor, table: RowTable, group: dict[str, Any]) -> None:
        betas, eps = floats(group["betas"]), group["eps"]
        with table.lock:
            check_weight(table, weight)
            if table.step_count:
                check_moments(table, stored(weight), self.state[weight])
            if (betas, eps) != (table.history.betas, table.history.eps):
                table.change_options(weight, betas, eps)
            assert weight.grad is not None
            grad = weight.grad if weight.grad.is_sparse else weight.grad.to_sparse(1)  # all zero
            grad = -grad if group["maximize"] else grad
            table.step(weight, grad, lr=float(group["lr"]), weight_decay=group["weight_decay"])
            self.state[weight] = table.live

    # Rows as of now

    @torch.no_grad()
    def flush(self) -> None:
        """Store in every registered table what dense AdamW would have there now.

        What follows may differ in the last bits from a run that was not flushed. `flushed` leaves
        no such trace.
        """
        for weight, table in self._check_tables(self._groups()).items():
            check_weight(table, stored(weight))
            table.flush(weight)

    @contextlib.contextmanager
    def flushed(self) -> Iterator[None]:
        """Inside, `embedding.weight` of every registered table is what dense AdamW would have.

        Afterwards every bit is as before, unless the weight was written or flushed inside. It is
        for code that reads a weight often, or reads its memory. Inside, `step` and
        `load_state_dict` raise UserError.
        """
        with contextlib.ExitStack() as stack:
            for weight, table in self._check_tables(self._groups()).items():
                check_weight(table, stored(weight))
                stack.enter_context(flushed(table, weight))
            yield

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the state dicts of model and optimizer show, and load, rows as they are stored.

        Stored rows are left at their own last steps, and such a pair resumes bit by bit as if the
        run had not stopped. Outside, the pair shows every row brought up to now, and it goes on
        along the same trajectory to rounding, also with other weights (averaged, or in half
        precision). A model from inside with an optimizer from outside, or the reverse, is refused
        with UserError. So is the use of `deferred` inside `flushed`.
        """
        with contextlib.ExitStack() as stack:
            for table in {table: None for _, table in self._tables}:
                stack.enter_context(deferred(table))
            yield

    def release(self) -> None:
        """Flush, and turn the registered embeddings back into what they were.

        This optimizer does not step them any more.
        """
        self.flush()
        for module, _ in self._tables:
            make_plain(module)

    # State

    def registered_weights(self) -> dict[int, Tensor]:
        """Return the weights of the registered embeddings by their index in the state dict."""
        return {index: weight for index, weight, _ in self._table_entries()}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does; that of a registered table is a `RowState` as a dict."""
        self._begin_anew(self._groups())
        live = {}
        for _, weight, table in self._table_entries():
            if table.step_count:
                live[weight] = self.state[weight]
                self.state[weight] = saved_state(table, weight).as_dict()
        try:  # so that hooks see what is saved
            return super().state_dict()
        finally:
            self.state.update(live)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Tables keep their integers and float32 moments, also if the parameter's dtype is another.
        Raises UserError for the state of another optimizer, and inside `flushed`.
        """
        if any(table.showing is Showing.FLUSHED for _, table in self._tables):
            raise UserError("no state can be loaded inside `optimizer.flushed()`. Load it outside")
        hook = self.register_load_state_dict_pre_hook(seal)  # after every hook of other people
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def _restore_tables(self) -> None:
        """Take over the states that `seal` kept from torch, which would cast their tensors."""
        groups = self._groups()
        for _, weight, table in self._table_entries():
            sealed = self.state.pop(weight, None)
            with table.lock:
                if sealed is not None:
                    restore_table(table, weight, RowState.from_dict(sealed.state))
                    self.state[weight] = table.live
                else:
                    if not table.has_loaded_rows:
                        table.flush(weight)
                    table.clear(weight, floats(groups[weight]["betas"]), groups[weight]["eps"])

    def _begin_anew(self, groups: dict[Tensor, dict[str, Any]]) -> None:
        """Forget the steps of tables whose entry in `state` other code removed, as torch does."""
        for module, table in self._tables:
            weight = module.weight
            is_gone = "exp_avg" not in self.state.get(weight, ())
            if table.step_count and weight in groups and is_gone:
                with table.lock:
                    table.flush(weight)
                    table.clear(weight, floats(groups[weight]["betas"]), groups[weight]["eps"])
                    self.state.pop(weight, None)

    # Embeddings

    @torch.no_grad()
    def _register(self, module: nn.Embedding) -> None:
        if any(module is own for own, _ in self._tables):
            return
        group = next(
            (
                group
                for group in self.param_groups
                if any(param is module.weight for param in group["params"])
            ),
            None,
        )
        check_embedding(module, in_group=group is not None)
        assert group is not None
        betas = floats(group["betas"])
        check_missed_steps(self.missed_steps, betas, group["eps"])
        table = table_of(module.weight)
        is_own = any(table is own for _, own in self._tables)
        if table is not None and not is_own:  # of an earlier optimizer
            table.flush(module.weight)
        if isinstance(module, RowLookup):
            make_plain(module)
        if table is None or not is_own:
            table = RowTable(
                module.weight, missed_steps=self.missed_steps, betas=betas, eps=group["eps"]
            )
        make_lazy(module, table)
        assert isinstance(module, RowLookup)
        self._tables.append((module, table))

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        """Return the parameter group of each parameter."""
        return {param: group for group in self.param_groups for param in group["params"]}

    def _check_tables(self, groups: dict[Tensor, dict[str, Any]]) -> dict[Tensor, RowTable]:
        """Return the tables by weight.

        Raises UserError if modules or parameters are not those that were registered.
        """
        for module, table in self._tables:
            check_table(module, table, groups.get(module.weight))
        return {module.weight: table for module, table in self._tables}

    def _table_entries(self) -> Iterator[tuple[int, Tensor, RowTable]]:
        """Yield index in the state dict, weight and table of each registered embedding."""
        tables = {module.weight: table for module, table in self._tables}
        for index, param in enumerate(
            param for group in self.param_groups for param in group["params"]
        ):
            if param in tables:
                yield index, param, tables[param]
