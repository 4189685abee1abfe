"""What a table shows and saves; its state belongs to the weight that was saved with it.

Weight and state are saved by two objects, model and optimizer, as a pair. Either both show rows as
they are stored, or (by default) both show every row brought up to now. A mixed pair would make up
missed steps twice, or never, and train on without a word. So the state carries a few rows of its
weight, the witness, and what they would be in a mixed pair. They are compared with the weight
before the state is first used, in whichever order the two were loaded.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.optim.lazy.eligible import check_rule
from finetune.optim.lazy.state import RowState, Showing, Witness, same
from finetune.optim.lazy.table import RowTable, stored

_WITNESSES = 16


def saved_state(table: RowTable, weight: Tensor) -> RowState:
    """Return a copy of the state that goes with the weight in the module's state dict."""
    weight, deferred = stored(weight), table.showing is Showing.DEFERRED
    as_stored = table.stored_state()
    state = as_stored if deferred else table.settled_state(weight)
    never_stepped = (table.slot_of_row == 0).nonzero()[:1, 0]
    longest_missed = as_stored.last_step.argsort(stable=True)[:_WITNESSES]
    rows = torch.cat([state.rows[longest_missed], never_stepped])
    witness = [table.read(weight, rows), (weight if table.aside is None else table.aside)[rows]]
    own, mixed = reversed(witness) if deferred else witness
    copied = (value.clone() if isinstance(value, Tensor) else value for value in state)
    return RowState._make(copied)._replace(witness_rows=rows, witness=own, mixed_witness=mixed)


def restore_table(table: RowTable, weight: Tensor, state: RowState) -> None:
    """Take over a saved state, before or after the weight that it belongs to is loaded."""
    weight = stored(weight)
    witness = state.witness_for(weight)
    if not (_belongs(weight, witness) or table.has_loaded_rows):
        table.flush(weight)
    if table.master is not None and state.master is None:
        state = state._replace(master=weight[state.rows].float())
    table.start(weight, state)
    table.witness = witness


def weight_was_loaded(table: RowTable, weight: Tensor) -> None:
    """Take the rows that were just loaded into `weight` for rows as of now.

    If they are of the pair that the state at hand was saved in, or of a pair mixed with it, the
    first use of the state looks at them.
    """
    weight = stored(weight)
    table.writes += 1
    if table.showing is Showing.FLUSHED:
        return  # the end of `flushed` sees it
    table.version = weight._version
    known = False
    if table.witness is not None:
        right, mixed = table.witness.found_in(weight)
        known = bool(right.all() or (right != mixed).any())
    if table.showing is Showing.DEFERRED:
        table.has_loaded_rows = True
    if table.showing is Showing.DEFERRED or known:
        if table.witness is None:
            _fit_masters(table, weight)
    else:
        take_as_now(table, weight)


def weight_was_written(table: RowTable, weight: Tensor) -> None:
    """Note that other code wrote to `weight` when no row lagged, or before the state was used."""
    table.writes += 1
    if table.showing is Showing.FLUSHED:
        return  # the end of `flushed` sees it
    table.version = weight._version
    if weight.device != table.device or weight.dtype != table.dtype:
        follow(table, weight)
    elif table.witness is None and table.master is not None:
        take_as_now(table, weight)  # else it may be, or become, the weight that the state awaits


def follow(table: RowTable, weight: Tensor) -> None:
    """Move `table` to where its weight has moved.

    Raises UserError if the weight's dtype has changed after the first step.
    """
    if weight.dtype != table.dtype:
        if table.step_count:
            raise UserError(
                f"a registered embedding became {weight.dtype} in mid-run, but its optimizer "
                f"state is for {table.dtype}. Change the dtype before the first step"
            )
        table.clear(weight, table.history.betas, table.history.eps)
    elif weight.device != table.device:
        table.start(weight, table.stored_state())


def take_as_now(table: RowTable, weight: Tensor) -> None:
    """Go on from what `weight` holds, as rows as of now."""
    table.witness = None
    state = table.settled_state(weight)
    if state.master is not None:
        state = state._replace(master=_fitting(state.master, weight[state.rows]))
    table.start(weight, state)


def _fit_masters(table: RowTable, weight: Tensor) -> None:
    """Give master rows that do not round to `weight` its values: the state may have had none."""
    if table.master is not None:
        had_gradient = slice(1, int(table.used))
        rows = table.row_of_slot[had_gradient]
        table.master[had_gradient] = _fitting(table.master[had_gradient], weight.detach()[rows])


def _fitting(master: Tensor, written: Tensor) -> Tensor:
    return torch.where(master.to(written.dtype) == written, master, written.float())


def check_weight(table: RowTable, weight: Tensor) -> None:
    """Raise UserError if `weight` is not the one that the state belongs to.

    It is not if the state was loaded with another weight, or if the weight's memory was written
    while rows lagged, by code that had it from elsewhere. Inside a transform of torch.func rows
    that lag cannot be read at all.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        if not table.weight_is_current:
            raise UserError(
                "torch.func's transforms (grad, vmap ...) cannot read an embedding whose rows are "
                "stepped lazily while some are not up to date. Call `optimizer.flush()` before, "
                "or use them inside `with optimizer.flushed():`"
            )
        return
    check_witness(table, weight)
    if weight._version == table.version or table.showing is Showing.FLUSHED:
        return
    if not table.is_settled:
        raise UserError(
            "a registered embedding's weight was written through another tensor over its memory "
            "while some rows were not up to date. Write to `embedding.weight` itself, or call "
            "`optimizer.flush()` before"
        )
    weight_was_written(table, weight)


def check_replacement(table: RowTable, data: Tensor) -> None:
    """Raise UserError if a table cannot go on with `data` as the data of its weight."""
    if data.shape != table.shape or (data.dtype != table.dtype and table.step_count):
        raise UserError(
            f"a registered embedding's weight is {list(table.shape)} in {table.dtype}, and was "
            f"given data of {list(data.shape)} in {data.dtype}. Call `optimizer.release()`, change "
            "the embedding, and build a new optimizer"
        )


def check_moments(table: RowTable, weight: Tensor, live: dict[str, Tensor]) -> None:
    """Take over the moments and the step count if other code changed them.

    `live` is the table's entry in `optimizer.state`. Raises UserError if the table cannot follow.
    """
    was_written = table.moments_were_written
    for key in ("exp_avg", "exp_avg_sq"):
        given, own = live.get(key), getattr(table, key)
        if given is own:
            continue
        form = (own.shape, own.dtype, own.device)
        if given is None or (given.shape, given.dtype, given.device) != form:
            raise UserError(
                f"among the moments of a registered embedding {key} is no longer the tensor that "
                "the optimizer keeps in `optimizer.state`. Write to that tensor in place"
            )
        if not same(given, own).all():  # else it was away and came back, as offloading does
            was_written = True
            own.copy_(given)
    step = int(live.get("step", table.step_count))
    if (was_written or step != table.step_count) and not table.is_settled:
        raise UserError(
            "the moments or the step count of a registered embedding were written while some of "
            "its rows were not up to date. Call `optimizer.flush()` before writing to them"
        )
    if step != table.step_count:
        _, rows, _, *moments = table.stored_state()[:5]
        betas, eps = table.history.betas, table.history.eps
        master = table.stored_state().master
        table.start(
            weight, RowState.up_to_date(step, rows, *moments, betas=betas, eps=eps, master=master)
        )


def awaits_its_weight(table: RowTable, weight: Tensor) -> bool:
    """Return whether the state was loaded, and `weight` is not yet the one that it belongs to."""
    return table.witness is not None and not _belongs(weight, table.witness)


def check_witness(table: RowTable, weight: Tensor) -> None:
    """Raise UserError if the state was loaded with a weight that it cannot go on with.

    A state in which no row lags goes on with any rows as of now. They are refused only if they are
    recognised as stored ones. Costs nothing after the first use.
    """
    if table.witness is None:
        return
    right, mixed = table.witness.found_in(weight)
    takes_any = table.is_settled and table.witness.mixed is not None
    if (mixed & ~right).any() if takes_any else not right.all():
        raise UserError(
            "the embedding's weight is not the one that the optimizer's state was saved with. Save "
            "(and load) the state dicts of model and optimizer both inside `with "
            "optimizer.deferred():`, or both outside it"
        )
    _fit_masters(table, weight)
    table.witness = None


def _belongs(weight: Tensor, witness: Witness | None) -> bool:
    return witness is not None and bool(witness.found_in(weight)[0].all())


@contextlib.contextmanager
def deferred(table: RowTable) -> Iterator[None]:
    """Inside, state dicts show, and load, rows as they are stored.

    Raises UserError inside `flushed`, where the weight does not hold rows as they are stored.
    """
    if table.showing is Showing.FLUSHED:
        raise UserError(
            "`optimizer.deferred()` cannot show stored rows inside `optimizer.flushed()`. "
            "Leave `flushed()` first"
        )
    before, table.showing = table.showing, Showing.DEFERRED
    try:
        yield
    finally:
        table.showing = before
        if before is not Showing.DEFERRED:
            table.has_loaded_rows = False


@contextlib.contextmanager
def flushed(table: RowTable, weight: Tensor) -> Iterator[None]:
    """Inside, `weight` holds rows as of now; afterwards every bit of it is as before.

    If the weight was written inside, it keeps what it holds at the end, as rows as of then.
    """
    if table.showing is Showing.FLUSHED:
        yield
        return
    weight, before = stored(weight), table.showing
    with torch.no_grad(), table.lock:
        table.aside = weight.clone()
        weight.copy_(table.dense(weight))
        table.showing = Showing.FLUSHED
        shown = table.version, table.writes = weight._version, table.writes
    try:
        yield
    finally:
        with torch.no_grad(), table.lock:
            written = (weight._version, table.writes) != shown
            kept, table.aside, table.showing = table.aside, None, before
            if written:
                take_as_now(table, weight)
            else:
                weight.copy_(kept)
                table.version = weight._version


@dataclass(frozen=True)
class Sealed:
    """The saved state of a table on its way through torch's `load_state_dict`."""

    state: dict[str, Any]


def seal(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return `state_dict` with the states of tables sealed.

    A hook of a LazyAdamW. Raises UserError if they are not of a LazyAdamW, or of tables that it
    does not have.
    """
    sealed, tables = dict(state_dict["state"]), optimizer.registered_weights()
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for position, index in enumerate(indices):
        state = sealed.get(index)
        if not state:
            sealed.pop(index, None)
        elif position in tables and "last_step" not in state:
            raise UserError(
                "this is not the state of a LazyAdamW. To load the state of an AdamW, use "
                "finetune.optim.from_adamw_state"
            )
        elif position in tables:
            sealed[index] = Sealed(state)
        elif "last_step" in state:
            name = repr(names[position]) if position < len(names) else f"number {position}"
            raise UserError(
                f"the saved state of parameter {name} is of a table that was stepped lazily, but "
                "no registered embedding has it here. Name its module in `embeddings`, or load "
                "finetune.optim.adapt_state(optimizer, state), after the weights saved with it"
            )
    for group in state_dict["param_groups"]:
        check_rule(group)
    return {**state_dict, "state": sealed}
