"""LazyAdamW: dense AdamW's result for embeddings whose rows cost time only when a batch uses them.

AdamW: I. Loshchilov and F. Hutter, https://arxiv.org/abs/1711.05101. This file is the
torch.optim.Optimizer; the package's docstring says where the rest is.
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
    check_group,
    check_missed_steps,
    check_mode,
    floats,
)
from finetune.optim.lazy.embedding import RowLookup, make_lazy, make_plain
from finetune.optim.lazy.saved import check_witness, restore_table, saved_state
from finetune.optim.lazy.state import RowState, Showing
from finetune.optim.lazy.table import RowTable


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

    Reading rows is pure: the module's forward returns rows as of now and stores nothing. So
    evaluating or saving changes not one bit of the run; only ``step`` writes.
    ``model.state_dict()``, and therefore saving and exporting, shows rows as of now. Code that
    reads ``embedding.weight`` itself (weight averaging, resizing, tying) must do so inside
    ``with optimizer.flushed():`` or after ``optimizer.flush()``. For a checkpoint that resumes bit
    by bit, take both state dicts inside ``with optimizer.deferred():``.

    A table whose ``grad`` is None misses nothing: as in torch, the parameter is not stepped and its
    step count does not grow. A gradient without entries is a step. A dense gradient at a registered
    table is an error: it comes from code that read rows that were not up to date. Changing lr or
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
        embeddings: nn.Embedding modules whose weights are among ``params`` and used by no other
            module.
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
        check_group(group)
        if any(param.is_complex() for param in group["params"]):
            raise UserError(
                "LazyAdamW does not take complex parameters. Use torch.optim.AdamW for them"
            )
        for module in embeddings:
            self._register(module)

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
        tables = self._check_tables()
        if any(
            table.showing is Showing.FLUSHED and weight.grad is not None
            for weight, table in tables.items()
        ):
            raise UserError("no step can be taken inside `optimizer.flushed()`. Take it outside")
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
        """Apply torch's own AdamW.

        In "replay" it is the loop whose operations step the rows, else the fused kernel.
        """
        for param in params:
            if not self.state[param]:
                self.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        # The fused kernel walks over memory as it lies, and torch does not check strides. So a
        # parameter and its gradient must both be contiguous.
        alike: list[Tensor] = []
        others: list[Tensor] = []
        for param in params:
            contiguous = (
                param.is_contiguous() and param.grad is not None and param.grad.is_contiguous()
            )
            (alike if contiguous and self.missed_steps != "replay" else others).append(param)
        _adamw(self.state, alike, group, fused=True)
        _adamw(self.state, others, group, fused=False)

    # Rows as of now

    @torch.no_grad()
    def flush(self) -> None:
        """Store in every registered table what dense AdamW would have there now.

        What follows may differ in the last bits from a run that was not flushed. `flushed` leaves
        no such trace.
        """
        for weight, table in self._check_tables().items():
            table.flush(weight)

    @contextlib.contextmanager
    def flushed(self) -> Iterator[None]:
        """Inside, `embedding.weight` of every registered table is what dense AdamW would have.

        Afterwards every bit is as before. It is for code that reads weights itself. What is written
        to the tables inside is lost. Inside, `step` and `load_state_dict` raise UserError.
        """
        with contextlib.ExitStack() as stack:
            for weight, table in self._check_tables().items():
                stack.enter_context(table.flushed(weight))
            yield

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the state dicts of model and optimizer show, and load, rows as they are stored.

        Stored rows are left at their own last steps, and such a pair resumes bit by bit as if the
        run had not stopped. Outside, the pair shows every row brought up to now, and it goes on
        along the same trajectory to rounding. A model from inside with an optimizer from outside,
        or the reverse, is refused with UserError. So is the use of `deferred` inside `flushed`.
        """
        with contextlib.ExitStack() as stack:
            for _, table in self._tables:
                stack.enter_context(table.deferred())
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
        packed = super().state_dict()
        for index, weight, table in self._table_entries():
            if table.step_count:
                packed["state"][index] = saved_state(table, weight).as_dict()
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Tables keep their integers and float32 moments, also if the parameter's dtype is another.
        Raises UserError for the state of another optimizer, and inside `flushed`.
        """
        entries = list(self._table_entries())
        if any(table.showing is Showing.FLUSHED for _, _, table in entries):
            raise UserError("no state can be loaded inside `optimizer.flushed()`. Load it outside")
        own = {index: state_dict["state"].get(index) for index, _, _ in entries}
        for state in own.values():
            if state is not None and "last_step" not in state:
                raise UserError(
                    "this is not the state of a LazyAdamW. To load the state of an AdamW, use "
                    "finetune.optim.from_adamw_state"
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
        """Return the tables by weight.

        Raises UserError if modules, parameters or gradients are not those that were registered.
        """
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for module, table in self._tables:
            if getattr(module, "row_table", None) is not table:
                raise UserError(
                    "a registered embedding was released or given to another optimizer. Build a "
                    "new optimizer"
                )
            if module.weight not in groups:
                raise UserError(
                    "the weight of a registered embedding is no longer among the optimizer's "
                    "parameters: resizing or sharding the model replaced it. Build the optimizer "
                    "afterwards, and keep registered embeddings out of FSDP"
                )
            group, grad = groups[module.weight], module.weight.grad
            if grad is not None and not grad.is_sparse:
                raise UserError(
                    "a registered embedding got a dense gradient: other code reads its weight, in "
                    "which rows may not be up to date (a tied output head, a penalty on the "
                    "weights). Leave it out of `embeddings`"
                )
            if float(group["lr"]) * group["weight_decay"] >= 1:
                raise UserError(
                    f"lr * weight_decay must be below 1, not {float(group['lr'])} * "
                    f"{group['weight_decay']}"
                )
            check_missed_steps(self.missed_steps, floats(group["betas"]), group["eps"])
        tables = {module.weight: table for module, table in self._tables}
        if any(
            param.grad is not None and param.grad.is_sparse and param not in tables
            for param in groups
        ):
            raise UserError(
                "a parameter that is not a registered embedding got a sparse gradient. Name its "
                "module in `embeddings`"
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
