"""Saving and restoring a RowTable beside the weight that it belongs to.  Floor 1.

Weight and state are saved by two objects, model and optimizer, as a pair: either rows and state as they are stored, or (by default)
both brought up to now.  A mixed pair would make up missed steps twice, or never, and train on without a word.  So the state carries
a few rows of the weight it belongs to, the witness, which are compared before the state is first used, in whatever order the two
were loaded.
"""

from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.optim.row_table import RowTable

_WITNESSES = 16


def saved_state(table: RowTable, weight: Tensor) -> dict[str, Any]:
    """Return the state to go with the weight that the module's state dict shows: the stored one, or that of `table.dense`."""
    stored = table.show_stored or table.is_current or table.read_as_stored
    state = table.stored_state() if stored else table.settled_state(weight)
    state = {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()
    }
    longest_missed = table.stored_state()["last_step"].argsort(stable=True)[:_WITNESSES]
    untouched = (table.slot_of_row == 0).nonzero()[:1, 0]
    rows = state["witness_rows"] = torch.cat([state["rows"][longest_missed], untouched])
    state["witness"] = weight[rows] if stored else table.read(weight, rows)
    return state


def restore(table: RowTable, weight: Tensor, state: dict[str, Any]) -> None:
    """Take over a saved state.  The weight it belongs to may be there already, or be loaded next."""
    witness = None  # of state from elsewhere, which goes with rows as they are now
    if "witness" in state:
        witness = (
            state["witness_rows"].to(table.device),
            state["witness"].to(table.device, table.dtype),
        )
    if not (witness and _matches(weight, witness)):
        table.flush(weight)
    if table.master is not None and "master" not in state:
        state = {**state, "master": weight[state["rows"]].float()}
    table.load_state(state)
    table.witness = witness


def weight_was_loaded(table: RowTable, weight: Tensor) -> None:
    """A state dict was loaded into the weight: unless these are the stored rows of the state at hand, they are current ones."""
    if table.show_stored or (table.witness and _matches(weight, table.witness)):
        return
    table.witness = None
    state = table.settled_state(weight)
    if table.master is not None:
        loaded, master = weight[state["rows"]], state["master"]
        state["master"] = torch.where(master.to(loaded.dtype) == loaded, master, loaded.float())
    table.load_state(state)


def check_witness(table: RowTable, weight: Tensor) -> None:
    """Raise UserError if the state was loaded beside a weight that it does not belong to.  Free after the first use."""
    if table.witness is None:
        return
    if not _matches(weight, table.witness):
        raise UserError(
            "the embedding's weight is not the one that the optimizer's state was saved with: save (and load) the state dicts of "
            "model and optimizer both inside `with optimizer.deferred():`, or both outside it"
        )
    table.witness = None


def _matches(weight: Tensor, witness: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(weight.detach()[witness[0]], witness[1])
