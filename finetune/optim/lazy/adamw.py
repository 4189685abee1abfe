"""LazyAdamW: dense AdamW's result for embeddings whose rows cost something only when a batch uses them.  Floor 1.

AdamW: I. Loshchilov and F. Hutter, https://arxiv.org/abs/1711.05101.  The mathematics of the missed steps is in gauss.py and
missed_steps.py, the state of a table in row_table.py, the lookup in lazy_embedding.py; this file is the torch.optim.Optimizer.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from finetune.errors import UserError
from finetune.optim.lazy.eligible import (
    check_embedding,
    check_missed_steps,
    check_mode,
    check_options,
    floats,
)
from finetune.optim.lazy.embedding import RowLookup, make_lazy, make_plain
from finetune.optim.lazy.saved import check_witness, restore_table, saved_state
from finetune.optim.lazy.state import RowState, Showing
from finetune.optim.lazy.table import RowTable


class LazyAdamW(Optimizer):
    r"""AdamW over dense parameters and, row by row, over the tables of registered embeddings.

    Dense AdamW moves every row of an embedding at every step: a row that the batch did not use still decays, and drifts on by its
    momentum. LazyAdamW steps only the rows in the gradient, and makes up what the others missed when they are next looked at:

    - ``missed_steps="exact"``: as dense AdamW, to rounding, at a constant cost for any number of missed steps.  The reference is
      AdamW in float64: float32 rows stay as near to it as dense float32 AdamW does.
    - ``missed_steps="replay"``: one by one.  Bitwise ``torch.optim.AdamW(foreach=False)`` in float32 and float64, and slow.
    - ``missed_steps="skip"``: never.  Unused rows are frozen: no drift, no decay.  These are the semantics of TensorFlow's
      LazyAdam and torch's SparseAdam, and **train another model than AdamW does**.

    Looking rows up is pure: the module's forward returns rows as they are now and stores nothing, so evaluating or saving changes
    not one bit of the run. Only ``step`` writes. ``model.state_dict()``, hence saving and exporting, shows the rows as they are
    now. Code that reads ``embedding.weight`` itself (weight averaging, resizing, tying) does so inside ``with
    optimizer.flushed():`` or after ``optimizer.flush()``. For a checkpoint that resumes bit by bit take both state dicts inside
    ``with optimizer.deferred():``.

    A table whose ``grad`` is None misses nothing: as in torch the parameter is not stepped and its clock stands. A gradient
    without entries is a step. A dense gradient at a registered table is an error: it comes from code that read rows not up to
    date. Changing lr or weight_decay between steps costs nothing; changing betas or eps flushes the table first. An embedding
    that is resized is a new table: flush, resize, and build a new optimizer.

    float32 and float64 weights; bfloat16 and float16 weights of registered tables keep float32 master rows (dense parameters
    follow torch.optim.AdamW, state in the parameter's dtype). On CUDA the step waits for the device only to coalesce a gradient
    that is not yet coalesced and when a table may have to grow; a tensor ``lr`` is read on the host; ``replay`` and the lookup's
    ``unique`` wait too.

    Args:
        params: parameters or parameter groups, as for torch's optimizers.  A group may have its own ``embeddings``.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.  lr * weight_decay must be below 1 at every step.
        embeddings: nn.Embedding modules, their weights among ``params`` and used by no other module.
        missed_steps: "exact", "replay" or "skip".

    Raises:
        UserError: an option is out of its range, or an embedding cannot be stepped lazily (max_norm, scale_grad_by_freq, frozen,
            complex, not among the parameters).
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
        return {
            **super().__getstate__(),
            "missed_steps": self.missed_steps,
            "_tables": self._tables,
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its entry "embeddings", if any, holds the modules to register."""
        embeddings = param_group.get("embeddings", ())
        super().add_param_group(
            {key: value for key, value in param_group.items() if key != "embeddings"}
        )
        group = self.param_groups[-1]
        check_options(group)
        if any(param.is_complex() for param in group["params"]):
            raise UserError(
                "LazyAdamW does not take complex parameters; use torch.optim.AdamW for them"
            )
        for module in embeddings:
            self._register(module)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one step; returns what `closure`, which computes the loss and the gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = self._check_tables()
        for group in self.param_groups:
            dense = []
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param in tables:
                    self._step_table(param, tables[param], group)
                else:
                    dense.append(param)
            self._step_dense(dense, group)
        return loss

    def _step_table(self, weight: Tensor, table: RowTable, group: dict[str, Any]) -> None:
        check_witness(table, weight)
        betas, eps = floats(group["betas"]), group["eps"]
        if (betas, eps) != (table.history.betas, table.history.eps):
            table.change_options(weight, betas, eps)
        assert weight.grad is not None
        grad = -weight.grad if group["maximize"] else weight.grad
        table.step(weight, grad, lr=float(group["lr"]), weight_decay=group["weight_decay"])
        self.state[weight] = table.live_state()

    def _step_dense(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """torch's own AdamW: the fused kernel, or in "replay" the loop whose operations the rows are stepped with."""
        for param in params:
            if not self.state[param]:
                self.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        # The fused kernel walks over memory as it lies, so parameter and gradient must lie alike; torch does not check.
        fused = self.missed_steps != "replay"
        alike = [
            fused and param.is_contiguous() and param.grad.is_contiguous()
            for param in params
            if param.grad is not None
        ]
        _adamw(
            self.state,
            [param for param, is_alike in zip(params, alike) if is_alike],
            group,
            fused=True,
        )
        _adamw(
            self.state,
            [param for param, is_alike in zip(params, alike) if not is_alike],
            group,
            fused=False,
        )

    # Rows as they are now

    @torch.no_grad()
    def flush(self) -> None:
        """Store in every registered table what dense AdamW would have there now.

        For good: what follows may differ in the last bits from a run that was not flushed.  To look without a trace use `flushed`.
        """
        for weight, table in self._check_tables().items():
            table.flush(weight)

    @contextlib.contextmanager
    def flushed(self) -> Iterator[None]:
        """Inside, `embedding.weight` of every registered table is what dense AdamW would have; afterwards every bit is as before.

        For code that reads weights itself.  What is written to the tables inside is lost, and `step` must not be called.
        """
        with contextlib.ExitStack() as stack:
            for weight, table in self._check_tables().items():
                stack.enter_context(table.flushed(weight))
            yield

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the state dicts of model and optimizer show, and load, rows as they are stored, left at their last steps.

        Such a pair resumes bit by bit as if the run had not stopped.  Outside, the pair shows every row brought up to now: it goes
        on along the same trajectory, to rounding.  A model from inside with an optimizer from outside, or the reverse, is refused.
        """
        with contextlib.ExitStack() as stack:
            for _, table in self._tables:
                stack.enter_context(table.deferred())
            yield

    def release(self) -> None:
        """Flush and turn the registered embeddings back into what they were.  This optimizer steps them no more."""
        self.flush()
        for module, _ in self._tables:
            make_plain(module)

    # State

    def registered_weights(self) -> dict[int, Tensor]:
        """Return the weights of the registered embeddings by their index in the state dict."""
        return {index: weight for index, weight, _ in self._table_entries()}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the state, as torch does; of a registered table: `step`, and `exp_avg`, `exp_avg_sq` of its touched `rows`."""
        packed = super().state_dict()
        for index, weight, table in self._table_entries():
            if table.step_count:
                packed["state"][index] = saved_state(table, weight).as_dict()
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.  Tables keep their integers and float32 moments whatever the parameter's dtype."""
        entries = list(self._table_entries())
        if any(table.showing is Showing.FLUSHED for _, _, table in entries):
            raise UserError("no state can be loaded inside `optimizer.flushed()`. Load it outside")
        own = {index: state_dict["state"].get(index) for index, _, _ in entries}
        for state in own.values():
            if state is not None and "last_step" not in state:
                raise UserError(
                    "this is not the state of a LazyAdamW; for one of AdamW use finetune.optim.lazy.convert.from_adamw_state"
                )
        dense = {index: state for index, state in state_dict["state"].items() if index not in own}
        super().load_state_dict({**state_dict, "state": dense})
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for index, weight, table in entries:
            self.state.pop(weight, None)
            if (state := own[index]) is not None:
                restore_table(table, weight, RowState.from_dict(state))
                self.state[weight] = table.live_state()
            else:
                table.flush(weight)
                table.clear(weight, floats(groups[weight]["betas"]), groups[weight]["eps"])

    # Embeddings

    @torch.no_grad()
    def _register(self, module: nn.Embedding) -> None:
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
        if isinstance(module, RowLookup):  # of an earlier optimizer
            module.row_table.flush(module.weight)
            make_plain(module)
        table = RowTable(
            module.weight, missed_steps=self.missed_steps, betas=betas, eps=group["eps"]
        )
        make_lazy(module, table)
        assert isinstance(module, RowLookup)
        self._tables.append((module, table))

    def _check_tables(self) -> dict[Tensor, RowTable]:
        """Return the tables by weight, after making sure that modules, parameters and gradients are still what was registered."""
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for module, table in self._tables:
            if getattr(module, "row_table", None) is not table:
                raise UserError(
                    "a registered embedding was released or given to another optimizer; build a new optimizer"
                )
            if module.weight not in groups:
                raise UserError(
                    "the weight of a registered embedding is no longer among the optimizer's parameters (resizing or sharding the "
                    "model replaced it); build the optimizer afterwards, and keep registered embeddings out of FSDP"
                )
            group, grad = groups[module.weight], module.weight.grad
            if table.showing is Showing.FLUSHED and grad is not None:
                raise UserError("no step can be taken inside `optimizer.flushed()`")
            if grad is not None and not grad.is_sparse:
                raise UserError(
                    "a registered embedding got a dense gradient: other code reads its weight, where rows may not be up to date "
                    "(a tied output head, a penalty on the weights); leave it out of `embeddings`"
                )
            if float(group["lr"]) * group["weight_decay"] >= 1:
                raise UserError(
                    f"lr * weight_decay must be below 1, not {float(group['lr'])} * {group['weight_decay']}"
                )
            check_missed_steps(self.missed_steps, floats(group["betas"]), group["eps"])
        tables = {module.weight: table for module, table in self._tables}
        if any(
            param.grad is not None and param.grad.is_sparse and param not in tables
            for param in groups
        ):
            raise UserError(
                "a parameter that is not a registered embedding got a sparse gradient; name its module in `embeddings`"
            )
        return tables

    def _table_entries(self) -> Iterator[tuple[int, Tensor, RowTable]]:
        """Yield index in the state dict, weight and table of each registered embedding."""
        tables = {module.weight: table for module, table in self._tables}
        for index, param in enumerate(
            param for group in self.param_groups for param in group["params"]
        ):
            if param in tables:
                yield index, param, tables[param]


def _adamw(
    state: dict[Tensor, Any], params: list[Tensor], group: dict[str, Any], *, fused: bool
) -> None:
    if fused:
        for param in params:
            state[param]["step"] = state[param]["step"].to(param.device)
    adamw(
        params,
        [param.grad for param in params if param.grad is not None],
        [state[param]["exp_avg"] for param in params],
        [state[param]["exp_avg_sq"] for param in params],
        [],
        [state[param]["step"] for param in params],
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
