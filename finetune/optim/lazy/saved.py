"""Saving and loading a table's state, which belongs to the weight that was saved with it.

Weight and state are saved by two objects, model and optimizer, as a pair. Either both show rows as
they are stored, or (by default) both show every row brought up to now. A mixed pair would make up
missed steps twice, or never, and train on without a word. So the state carries a few rows of its
weight, the witness. They are compared with the weight before the state is first used, in whichever
order the two were loaded.
"""

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.optim.lazy.state import RowState, Showing
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
    witness = weight[rows] if deferred else table.read(weight, rows)
    copied = (value.clone() if isinstance(value, Tensor) else value for value in state)
    return RowState._make(copied)._replace(witness_rows=rows, witness=witness)


def restore_table(table: RowTable, weight: Tensor, state: RowState) -> None:
    """Take over a saved state, before or after the weight that it belongs to is loaded."""
    weight, witness = (
        stored(weight),
        None,
    )  # a state from elsewhere has none, and goes with rows as of now
    if state.witness_rows is not None and state.witness is not None:
        witness = state.witness_rows.to(table.device), state.witness.to(table.device, table.dtype)
    if not (witness and _matches(weight, witness)):
        table.flush(weight)
    if table.master is not None and state.master is None:
        state = state._replace(master=weight[state.rows].float())
    table.start(weight, state)
    table.witness = witness


def weight_was_loaded(table: RowTable, weight: Tensor) -> None:
    """Take the rows that were just loaded into `weight` for rows as of now.

    If they are the stored rows that the state at hand belongs to, nothing is to be done.
    """
    weight = stored(weight)
    table.writes += 1
    if table.showing is Showing.FLUSHED:
        return  # the end of `flushed` sees it
    table.version = weight._version
    stored_rows = table.witness is not None and _matches(weight, table.witness)
    if not (table.showing is Showing.DEFERRED or stored_rows):
        take_as_now(table, weight)


def weight_was_written(table: RowTable, weight: Tensor) -> None:
    """Note that other code wrote to `weight` when no row lagged."""
    table.writes += 1
    if table.showing is Showing.FLUSHED:
        return  # the end of `flushed` sees it
    table.version = weight._version
    if weight.device != table.device or weight.dtype != table.dtype:
        table.follow(weight)
    elif table.master is not None:
        take_as_now(table, weight)


def take_as_now(table: RowTable, weight: Tensor) -> None:
    """Go on from what `weight` holds, as rows as of now."""
    table.witness = None
    state = table.settled_state(weight)
    if state.master is not None:
        written, master = weight[state.rows], state.master
        kept = torch.where(master.to(written.dtype) == written, master, written.float())
        state = state._replace(master=kept)
    table.start(weight, state)


def check_weight(table: RowTable, weight: Tensor) -> None:
    """Raise UserError if `weight` is not the one that the state belongs to.

    It is not if the state was loaded with another weight, or if the weight's memory was written
    while rows lagged, by code that had it from elsewhere.
    """
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


def check_witness(table: RowTable, weight: Tensor) -> None:
    """Raise UserError if the state was loaded with a weight that it does not belong to.

    Costs nothing after the first use.
    """
    if table.witness is None:
        return
    if not _matches(weight, table.witness):
        raise UserError(
            "the embedding's weight is not the one that the optimizer's state was saved with. Save "
            "(and load) the state dicts of model and optimizer both inside `with "
            "optimizer.deferred():`, or both outside it"
        )
    table.witness = None


def _matches(weight: Tensor, witness: tuple[Tensor, Tensor]) -> bool:
    rows, values = (part.to(weight.device) for part in witness)
    return torch.equal(weight.detach()[rows], values)
