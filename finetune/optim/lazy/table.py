"""The optimizer state of one embedding table whose rows are stepped only when a batch uses them.

Rows that never had a gradient have no state. `slot_of_row` is 0 for them, and slot 0 is the row
without history: zero moments, last stepped when the whole table was last up to date. So every row
is read in the same way. The other slots are handed out as rows first get a gradient, and the arrays
grow by doubling.

Two rules keep the trajectory a function of the gradients alone, however often rows are read or
saved in between:

- Reading is pure. `read` returns rows as dense AdamW would have them now, and stores nothing.
- Only `step` writes (and `flush`, when asked). It brings the rows in the gradient up from their
  last step and then applies this one.

Weights in bfloat16 or float16 keep float32 master rows with the moments. All arithmetic is in
float32, or in float64 for float64 weights.
"""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.optim.gradients import coalesce
from finetune.optim.lazy.missed_steps import GaussRules, History, adamw_step_, replay_
from finetune.optim.lazy.scratch import Block, Memo, Scratch, outlives_inference_mode
from finetune.optim.lazy.state import RowState, Showing, Witness

_logger = logging.getLogger("finetune")

MISSED_STEPS = ("exact", "replay", "skip")

_BLOCK_ELEMENTS = 1 << 18  # at once on a CPU: fits its last cache and feeds every thread
_CACHE_LINE = 16  # float32 numbers; see missed_steps.adamw_step_


def stored(weight: Tensor) -> Tensor:
    """Return a plain tensor over the memory of `weight`: rows as they are stored."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach()


class RowTable:
    """Moments of the rows of a [V, d] weight that had a gradient, and the history of the steps."""

    def __init__(
        self, weight: Tensor, *, missed_steps: str, betas: tuple[float, float], eps: float
    ) -> None:
        self.missed_steps = missed_steps
        self.scratch = Scratch()
        self.showing = Showing.CURRENT
        self.aside: Tensor | None = None  # inside `flushed`: the weight as stored
        self.witness: Witness | None = None  # of a state just loaded: see saved.py
        self.version = 0  # of the weight, after what the table itself wrote to it
        self.writes = 0  # by other code, and states started from
        self.seen: tuple[tuple, Tensor | None] | None = None  # see `dense_once`
        self.options_changed = 0  # how often betas or eps did
        self.warned = False  # that somebody asked for the weight's memory
        self.live: dict[str, Tensor] = {}  # the arrays in use, for `optimizer.state`
        self.has_loaded_rows = False  # inside `deferred`: the weight was loaded, as it was stored
        self.clear(weight, betas, eps)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with: it is inside no block, and has seen nothing."""
        outside = {"showing": Showing.CURRENT, "aside": None, "has_loaded_rows": False}
        return {**vars(self), **outside, "seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._show_live()  # a copied tensor counts its writes from 0

    def clear(self, weight: Tensor, betas: tuple[float, float], eps: float) -> None:
        """Forget everything: no step was applied, and no row had a gradient."""
        self.witness = None
        self.moments_seen: tuple[int, int] | None = None  # versions that the table itself wrote
        self.start(weight, RowState.before_the_first_step(weight.shape[1], betas=betas, eps=eps))

    @outlives_inference_mode
    def start(self, weight: Tensor, state: RowState) -> None:
        """Go on from `state`, in exactly its numbers, with `weight`.

        Raises UserError if the state is of a table of another size, and as `under` does.
        """
        state = state.under(self.missed_steps)
        rows, lr = state.rows.to(weight.device, torch.int64), state.lr.double().tolist()
        least, width = (int(rows.max()) + 1 if len(rows) else 0), state.exp_avg.shape[1]
        if least > len(weight) or width != weight.shape[1]:
            raise UserError(
                f"the optimizer's state is of {least} rows or more, of {width} numbers each, but "
                f"the embedding is {list(weight.shape)}. Load it into the model it was saved with"
            )
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.compute_dtype = torch.promote_types(weight.dtype, torch.float32)
        beta1, beta2 = state.betas
        self.history = History((beta1, beta2), state.eps, since=int(state.step) - len(lr))
        for rate, weight_decay in zip(lr, state.weight_decay.double().tolist(), strict=True):
            self.history.record(rate, weight_decay)

        def with_slot_0(values: Tensor, fill: int, dtype: torch.dtype) -> Tensor:
            values = values.to(self.device, dtype)
            return torch.cat([values.new_full((1, *values.shape[1:]), fill), values])

        slots = torch.arange(1, len(rows) + 1, dtype=torch.int32, device=self.device)
        self.slot_of_row = torch.zeros(len(weight), dtype=torch.int32, device=self.device)
        self.slot_of_row[rows] = slots
        self.row_of_slot = with_slot_0(rows, 0, torch.int64)
        self.last_step = with_slot_0(state.last_step, self.history.since, torch.int64)
        self.exp_avg = with_slot_0(state.exp_avg, 0, self.compute_dtype)
        self.exp_avg_sq = with_slot_0(state.exp_avg_sq, 0, self.compute_dtype)
        self.master: Tensor | None = None
        if self.dtype != self.compute_dtype:
            assert state.master is not None
            self.master = with_slot_0(state.master, 0, torch.float32)
        self.used = torch.tensor(len(rows) + 1, device=self.device)
        self.used_at_most = len(rows) + 1
        self.scratch.forget()
        self.version, self.writes, self.seen = stored(weight)._version, self.writes + 1, None
        self.rules: GaussRules | None = None
        if self.missed_steps == "exact":
            self.rules = GaussRules(self.history, dtype=self.compute_dtype, device=self.device)
            self.rules.load(state)
        self._show_live()

    # What is known

    @property
    def lock(self) -> threading.RLock:
        """The lock to hold while rows are read or written: two threads share one scratch."""
        return self.scratch.lock

    def moment(self, weight: Tensor) -> tuple:
        """Return what changes whenever a row as of now does."""
        return self, self.step_count, self.writes, weight._version

    @property
    def step_count(self) -> int:
        return self.history.step

    @property
    def is_settled(self) -> bool:
        """Whether no row has missed a step that it will have to make up."""
        return not self.history.lr or self.missed_steps == "skip"

    @property
    def weight_is_current(self) -> bool:
        """Whether the weight itself holds every row as dense AdamW would have it."""
        return self.is_settled or self.showing is Showing.FLUSHED

    def stored_state(self) -> RowState:
        """Return the state as it is, rows left at their own last steps. Its tensors are views."""
        had_gradient = slice(1, int(self.used))
        state = RowState(
            step=torch.tensor(self.step_count, dtype=torch.float64, device="cpu"),
            rows=self.row_of_slot[had_gradient],
            last_step=self.last_step[had_gradient],
            exp_avg=self.exp_avg[had_gradient],
            exp_avg_sq=self.exp_avg_sq[had_gradient],
            lr=torch.tensor(self.history.lr, dtype=torch.float64, device="cpu"),
            weight_decay=torch.tensor(self.history.weight_decay, dtype=torch.float64, device="cpu"),
            betas=self.history.betas,
            eps=self.history.eps,
            master=None if self.master is None else self.master[had_gradient],
            skipped=True if self.missed_steps == "skip" else None,
        )
        return self.rules.add_to(state) if self.rules and self.history.lr else state

    def settled_state(self, weight: Tensor) -> RowState:
        """Return the state that goes with `dense`: every row brought up to now. Stores nothing."""
        weight, state = stored(weight), self.stored_state()
        if self.is_settled:
            return state
        exp_avg, exp_avg_sq = state.exp_avg.clone(), state.exp_avg_sq.clone()
        master = None if state.master is None else state.master.clone()
        slots = torch.arange(1, len(state.rows) + 1, device=self.device)
        for part, _, _, block in self._current(weight, state.rows, slots):
            exp_avg[part], exp_avg_sq[part] = block.exp_avg, block.exp_avg_sq
            if master is not None:
                master[part] = block.param
        options: dict[str, Any] = {"betas": state.betas, "eps": state.eps, "master": master}
        return RowState.up_to_date(self.step_count, state.rows, exp_avg, exp_avg_sq, **options)

    @property
    def moments_were_written(self) -> bool:
        """Whether other code wrote to the moments in `live` since the table itself did."""
        return self.moments_seen != (self.exp_avg._version, self.exp_avg_sq._version)

    def _show_live(self) -> None:
        """Put the arrays in use into `live`, slot 0 and room to grow included.

        What other code emptied stays empty: the optimizer then begins anew.
        """
        if self.moments_seen is not None and not self.live:
            return
        self.live["step"] = torch.tensor(self.step_count, dtype=torch.float64, device="cpu")
        self.live |= {"rows": self.row_of_slot, "last_step": self.last_step}
        self.live |= {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        self.live.pop("master", None)
        if self.master is not None:
            self.live["master"] = self.master
        self.moments_seen = self.exp_avg._version, self.exp_avg_sq._version

    # Reading

    def read(self, weight: Tensor, rows: Tensor, *, step_follows: bool = False) -> Tensor:
        """Return rows [k] of the table as of now, [k, d] in the weight's dtype. Writes nothing.

        `step_follows`: keep what was computed, for a step with a gradient in just these rows, which
        would otherwise compute it again. The result may then lie in memory that the next read or
        step overwrites.
        """
        weight = stored(weight)
        if self.weight_is_current:
            return weight[rows]
        with self.lock:
            slots = self.slot_of_row[rows].long()
            if step_follows and self.device.type == "cpu":  # comparing rows would wait for a GPU
                whole = self.scratch.take(len(rows), self._rows_at_once, self.exp_avg)
                for _ in self._current(weight, rows, slots, whole):
                    pass
                self.scratch.memo = Memo(rows, self.step_count, weight._version, whole)
                return whole.param.to(weight.dtype)
            out = weight.new_empty(len(rows), self.shape[1])
            for part, _, _, block in self._current(weight, rows, slots):
                out[part] = block.param
            return out

    def dense(self, weight: Tensor) -> Tensor:
        """Return the whole table [V, d] as dense AdamW would have it now. Writes nothing."""
        rows = torch.arange(len(weight), device=self.device)
        with self.lock:
            parts = [self.read(weight, some) for some in rows.split(1 << 14)]
            return torch.cat(parts, out=torch.empty_like(weight))  # in the layout of the weight

    def dense_once(self, weight: Tensor) -> Tensor:
        """Return what `dense` does. Asked again before anything moves, it keeps what it returns.

        So code that reads a table row by row pays for one table, and code that reads it once does
        not pay with memory.
        """
        with self.lock:
            moment = self.moment(weight)
            again = self.seen is not None and self.seen[0] == moment
            if self.seen is None or not again or self.seen[1] is None:
                dense = self.dense(weight)
                self.seen = moment, (dense if again else None)
                return dense
            return self.seen[1]

    # Writing

    def step(self, weight: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        """Apply AdamW's next step with the row-sparse gradient `grad` [V, d].

        The rows in it are brought up to now and moved.
        """
        assert self.showing is not Showing.FLUSHED
        weight, grad = stored(weight), coalesce(grad)
        rows, gradients = grad.indices()[0], grad.values()
        slots = self._claim(weight, rows)
        step, on_cpu = self.step_count + 1, self.device.type == "cpu"
        whole_lines = self.shape[1] % _CACHE_LINE == 0
        options: dict[str, Any] = {"step": step, "lr": lr, "weight_decay": weight_decay}
        options |= {"betas": self.history.betas, "eps": self.history.eps}
        options["fused"] = self.missed_steps != "replay" and on_cpu and whole_lines
        known = self._remembered(weight, rows)
        ready = known is not None
        for part, at, to, block in self._current(weight, rows, slots, known, ready=ready):
            gradient = gradients[part].to(self.compute_dtype).contiguous()
            adamw_step_(*block[:3], gradient, **options, work=block.work[0])
            weight.index_copy_(0, at, block.param.to(weight.dtype))
            for values, table in zip(block[:3], (self.master, self.exp_avg, self.exp_avg_sq)):
                if table is not None:
                    table.index_copy_(0, to, values)
        self.last_step.index_fill_(0, slots, step)
        self.history.record(lr, weight_decay)
        self.version, self.seen = weight._version, None
        self._show_live()

    def flush(self, weight: Tensor) -> None:
        """Bring every row up to now and store it.

        What follows may differ in the last bits from a run that was not flushed. Inside `flushed`
        the weight holds such rows already, and now keeps them.
        """
        weight = stored(weight)
        if not self.is_settled:
            dense, state = self.dense(weight), self.settled_state(weight)
            weight.copy_(dense)
            self.start(weight, state)
            self.aside = None

    def change_options(self, weight: Tensor, betas: tuple[float, float], eps: float) -> None:
        """Go on with other betas or another eps, after making up missed steps with the old ones.

        That moves the whole table. If it happens again, the log of "finetune" warns once.
        """
        if self.options_changed == 1:
            _logger.warning(
                "lazy_adamw: betas or eps changed again. Each change brings the whole table up to "
                "date, which costs as much as a dense step: with a schedule that cycles betas at "
                "every step (OneCycleLR, CyclicLR), pass cycle_momentum=False or use adamw"
            )
        self.options_changed += 1
        self.flush(weight)
        self.start(weight, self.stored_state()._replace(betas=betas, eps=eps))

    # The parts

    def _claim(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Return the slots of distinct rows, giving one to each row that had none."""
        self._reserve(len(rows))
        slots = self.slot_of_row[rows].long()
        fresh = slots == 0
        slots = torch.where(fresh, self.used - 1 + fresh.cumsum(0), slots)
        self.slot_of_row[rows] = slots.int()
        self.row_of_slot[slots] = rows
        # `masked_fill_` of a number, because a `where` would wait for a GPU.
        self.last_step[slots] = self.last_step[slots].masked_fill_(fresh, self.history.since)
        if self.master is not None:
            self.master[slots] = torch.where(
                fresh[:, None], weight[rows].float(), self.master[slots]
            )
        self.used += fresh.sum()
        self.used_at_most = min(self.used_at_most + len(rows), self.shape[0] + 1)
        return slots

    def _reserve(self, count: int) -> None:
        """Make room for `count` more slots.

        The device is asked how many are in use only when the arrays may be full.
        """
        capacity = len(self.last_step)
        if min(self.used_at_most + count, self.shape[0] + 1) <= capacity:
            return
        self.used_at_most = int(self.used)
        needed = min(self.used_at_most + count, self.shape[0] + 1)
        if needed > capacity:
            capacity = min(max(needed, 2 * capacity), self.shape[0] + 1)
            for name in ("row_of_slot", "last_step", "exp_avg", "exp_avg_sq", "master"):
                if (table := getattr(self, name)) is not None:
                    # Zeros that the system has not touched cost nothing until a slot is used.
                    grown = table.new_zeros(capacity, *table.shape[1:])
                    grown[: len(table)] = table
                    setattr(self, name, grown)

    @property
    def _rows_at_once(self) -> int:
        return max(1, _BLOCK_ELEMENTS // self.shape[1])

    def _remembered(self, weight: Tensor, rows: Tensor) -> Block | None:
        """Return the block of just these rows that the forward left, if it is still valid."""
        memo, self.scratch.memo = self.scratch.memo, None
        valid = memo is not None and (memo.step, memo.version) == (self.step_count, weight._version)
        return memo.block if memo and valid and torch.equal(memo.rows, rows) else None

    def _current(
        self,
        weight: Tensor,
        rows: Tensor,
        slots: Tensor,
        block: Block | None = None,
        *,
        ready: bool = False,
    ) -> Iterator[tuple[slice, Tensor, Tensor, Block]]:
        """Yield rows and slots with copies of their parameters and moments brought up to now.

        On a CPU they come some at a time. The copies are made in `block`, if it is given, and left
        there; if it is `ready`, they are there already.
        """
        size = self._rows_at_once if self.device.type == "cpu" else max(1, len(rows))
        whole = block or self.scratch.take(min(size, len(rows)), min(size, len(rows)), self.exp_avg)
        last_step = self.last_step[slots]
        coefficients = self.rules.coefficients(last_step, size) if self.rules and not ready else []
        for i, start in enumerate(range(0, len(rows), size)):
            part = slice(start, min(start + size, len(rows)))
            at, to = rows[part], slots[part]
            copies = whole.part(part if block else slice(len(at)))
            if not ready:
                self._gather(weight, at, to, copies)
                if self.rules:
                    coefficients[i].catch_up_(*copies)
                elif self.missed_steps == "replay":
                    replay_(*copies[:3], last_step[part], self.history)
            yield part, at, to, copies

    def _gather(self, weight: Tensor, rows: Tensor, slots: Tensor, into: Block) -> None:
        """Copy parameters and moments as they are stored."""
        if weight.dtype == self.compute_dtype:
            torch.index_select(weight.detach(), 0, rows, out=into.param)
        else:
            into.param.copy_(weight.detach()[rows])
        if self.master is not None:
            into.param.copy_(torch.where((slots > 0)[:, None], self.master[slots], into.param))
        torch.index_select(self.exp_avg, 0, slots, out=into.exp_avg)
        torch.index_select(self.exp_avg_sq, 0, slots, out=into.exp_avg_sq)
