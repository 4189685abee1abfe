"""What a table shows for the time of a `with` block: rows as they are stored, or as of now."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.optim.lazy.saved import take_as_now
from finetune.optim.lazy.state import Showing
from finetune.optim.lazy.table import RowTable, stored


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
