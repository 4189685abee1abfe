"""The optimizer state of one embedding table whose rows are stepped only when a batch uses them.  Floor 1.

Rows never touched have no state: `slot_of_row` is 0 for them, and slot 0 is the row without history (zero moments, last stepped
when the whole table was last up to date), so that every row is read in the same way.  Other slots are handed out as rows first get
a gradient; the arrays grow by doubling.

Two rules keep the trajectory a function of the gradients alone, whoever reads or saves in between:

- Reading is pure.  `read` returns rows as dense AdamW would have them now and stores nothing.
- Only `step` writes (and `flush`, when asked): the rows in the gradient are brought up from their last step and take this one.

Weights in bfloat16 or float16 keep float32 master rows beside the moments; all arithmetic is in float32, or float64 for float64.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.optim.missed_steps import GaussRules, History, adamw_step_, replay_
from finetune.optim.row_gradient import coalesce
from finetune.optim.scratch import Block, Scratch

MISSED_STEPS = ("exact", "replay", "skip")
_BLOCK_ELEMENTS = (
    1 << 18
)  # worked on at once on a CPU: stays in the last cache, and is enough for every thread
_CACHE_LINE = 16  # float32 numbers; see missed_steps.adamw_step_


class _Memo(NamedTuple):
    """Rows in the scratch, brought up to now for the forward of a training step, while step count and weight are as they were."""

    rows: Tensor
    step: int
    version: int
    block: Block


class RowTable:
    """Slots of moments for the touched rows of a [V, d] weight, and the history of the steps."""

    def __init__(
        self, weight: Tensor, *, missed_steps: str, betas: tuple[float, float], eps: float
    ) -> None:
        self.missed_steps = missed_steps
        self.dtype = weight.dtype
        self.compute_dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        self.shape, self.device = weight.shape, weight.device
        self.read_as_stored = (
            False  # the weight holds current rows for the moment: see LazyAdamW.flushed
        )
        self.show_stored = (
            False  # state dicts show rows and state as stored: see LazyAdamW.deferred
        )
        self.witness: tuple[Tensor, Tensor] | None = None  # of a state just loaded: see saved_rows
        self.clear(betas, eps)

    def clear(self, betas: tuple[float, float], eps: float) -> None:
        """Forget everything: no step applied, no row touched."""
        empty: dict[str, Any] = {
            "rows": torch.empty(0, dtype=torch.int64),
            "last_step": torch.empty(0, dtype=torch.int64),
            "exp_avg": torch.empty(0, self.shape[1]),
            "exp_avg_sq": torch.empty(0, self.shape[1]),
            "master": torch.empty(0, self.shape[1]),
            "step": torch.tensor(0.0),
            "lr": torch.empty(0),
            "weight_decay": torch.empty(0),
            "betas": betas,
            "eps": eps,
        }
        self.witness = None
        self.load_state(empty)

    # What is kept

    @property
    def step_count(self) -> int:
        return self.history.step

    @property
    def is_current(self) -> bool:
        """Whether the stored weight is what dense AdamW would have: no step was applied since all rows were up to date."""
        return not self.history.lr or self.missed_steps == "skip"

    @property
    def num_slots(self) -> int:
        """Rows ever touched (asks the device)."""
        return int(self.used) - 1

    def stored_state(self) -> dict[str, Any]:
        """Return the state as it is, rows left at their own last steps, as plain tensors and numbers."""
        touched = slice(1, int(self.used))
        state: dict[str, Any] = {
            "step": torch.tensor(float(self.step_count)),
            "rows": self.row_of_slot[touched],
            "last_step": self.last_step[touched],
            "exp_avg": self.exp_avg[touched],
            "exp_avg_sq": self.exp_avg_sq[touched],
            "lr": torch.tensor(self.history.lr, dtype=torch.float64),
            "weight_decay": torch.tensor(self.history.weight_decay, dtype=torch.float64),
            "betas": self.history.betas,
            "eps": self.history.eps,
        }
        if self.master is not None:
            state["master"] = self.master[touched]
        if self.missed_steps == "exact" and self.history.lr:
            state.update(self.rules.state())
        return state

    def live_state(self) -> dict[str, Tensor]:
        """Return the arrays in use, slot 0 and room to grow included, for who counts or looks at an optimizer's state."""
        arrays = {
            "rows": self.row_of_slot,
            "last_step": self.last_step,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
        }
        step = {"step": torch.tensor(float(self.step_count))}
        return {**step, **arrays, **({"master": self.master} if self.master is not None else {})}

    def settled_state(self, weight: Tensor) -> dict[str, Any]:
        """Return the state with every row brought up to now, to go with the table that `dense` returns; stores nothing."""
        state = self.stored_state()
        if self.is_current:
            return state
        settled: dict[str, Any] = {
            key: state[key].clone() for key in ("exp_avg", "exp_avg_sq", "master") if key in state
        }
        slots = torch.arange(1, len(state["rows"]) + 1, device=self.device)
        for part, _, _, block in self._current(weight, state["rows"], slots):
            for key, values in zip(("master", "exp_avg", "exp_avg_sq"), block[:3]):
                if key in settled:
                    settled[key][part] = values
        now = torch.full_like(state["last_step"], self.step_count)
        state = {
            key: value for key, value in state.items() if not key.startswith(("rule_", "window_"))
        }
        return {
            **state,
            **settled,
            "last_step": now,
            "lr": torch.empty(0),
            "weight_decay": torch.empty(0),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a state made by `stored_state` or `settled_state`, in exactly its numbers."""
        step, lr = int(state["step"]), state["lr"].double().tolist()
        self.history = History(tuple(state["betas"]), state["eps"], since=step - len(lr))
        for rate, weight_decay in zip(lr, state["weight_decay"].double().tolist(), strict=True):
            self.history.record(rate, weight_decay)
        rows = state["rows"].to(self.device, torch.int64)
        if len(rows) and int(rows.max()) >= self.shape[0]:
            raise UserError(
                f"the state has a row {int(rows.max())}, and the embedding has {self.shape[0]} rows"
            )

        def with_slot_0(values: Tensor, fill: int, dtype: torch.dtype) -> Tensor:
            values = values.to(self.device, dtype)
            return torch.cat([values.new_full((1, *values.shape[1:]), fill), values])

        self.slot_of_row = torch.zeros(self.shape[0], dtype=torch.int32, device=self.device)
        self.slot_of_row[rows] = torch.arange(
            1, len(rows) + 1, dtype=torch.int32, device=self.device
        )
        self.row_of_slot = with_slot_0(rows, 0, torch.int64)
        self.last_step = with_slot_0(state["last_step"], self.history.since, torch.int64)
        self.exp_avg = with_slot_0(state["exp_avg"], 0, self.compute_dtype)
        self.exp_avg_sq = with_slot_0(state["exp_avg_sq"], 0, self.compute_dtype)
        self.master = (
            with_slot_0(state["master"], 0, torch.float32)
            if self.dtype not in (torch.float32, torch.float64)
            else None
        )
        self.used = torch.tensor(len(rows) + 1, device=self.device)
        self.used_at_most = len(rows) + 1
        self.scratch = Scratch()
        self.rules = GaussRules(self.history, dtype=self.compute_dtype, device=self.device)
        if "rule_masses" in state:
            self.rules.load(state)

    def follow(self, weight: Tensor) -> None:
        """Move to where the weight has moved.  Its dtype may change only before the first step."""
        if weight.dtype != self.dtype:
            if self.step_count:
                raise UserError(
                    f"a registered embedding became {weight.dtype} in mid-run; its optimizer state is for {self.dtype}"
                )
            self.__init__(
                weight,
                missed_steps=self.missed_steps,
                betas=self.history.betas,
                eps=self.history.eps,
            )  # type: ignore[misc]
        elif weight.device != self.device:
            state, self.device = self.stored_state(), weight.device
            self.load_state(state)

    # Reading

    def read(self, weight: Tensor, rows: Tensor, *, step_follows: bool = False) -> Tensor:
        """Return rows [k] of the table as of now, [k, d] in the weight's dtype.  Writes nothing.

        `step_follows`: keep what was computed, for a step with a gradient in just these rows, which would compute the same again.
        The result may then lie in memory that the next read or step writes over.
        """
        if self.is_current:
            return weight[rows]
        keep = (
            step_follows and self.device.type == "cpu"
        )  # to compare rows, another device would have to be waited for
        slots = self.slot_of_row[rows].long()
        if keep:
            whole = self.scratch.take(len(rows), self._rows_at_once, self.exp_avg)
            for _ in self._current(weight, rows, slots, whole):
                pass
            self.scratch.memo = _Memo(rows, self.step_count, weight._version, whole)
            return whole.param.to(weight.dtype)
        out = weight.new_empty(len(rows), self.shape[1])
        for part, _, _, block in self._current(weight, rows, slots):
            out[part] = block.param
        return out

    def dense(self, weight: Tensor) -> Tensor:
        """Return the whole table as of now, [V, d]: what dense AdamW would have.  Writes nothing."""
        return torch.cat(
            [
                self.read(weight, rows)
                for rows in torch.arange(len(weight), device=self.device).split(1 << 14)
            ]
        )

    # Writing

    def step(self, weight: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        """Apply AdamW's next step with the row-sparse gradient `grad`: the rows in it are brought up to now and moved."""
        assert not self.read_as_stored
        grad = coalesce(grad)
        rows, gradients = grad.indices()[0], grad.values()
        slots = self._claim(weight, rows)
        step = self.step_count + 1
        options: dict[str, Any] = {
            "step": step,
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": self.history.betas,
            "eps": self.history.eps,
            "fused": self.missed_steps != "replay"
            and self.device.type == "cpu"
            and self.shape[1] % _CACHE_LINE == 0,
        }
        known = self._remembered(weight, rows)
        for part, at, to, block in self._current(
            weight, rows, slots, known, ready=known is not None
        ):
            gradient = gradients[part].to(self.compute_dtype).contiguous()
            adamw_step_(*block[:3], gradient, **options, work=block.work[0])
            weight.index_copy_(0, at, block.param.to(weight.dtype))
            for values, table in zip(block[:3], (self.master, self.exp_avg, self.exp_avg_sq)):
                if table is not None:
                    table.index_copy_(0, to, values)
        self.last_step.index_fill_(0, slots, step)
        self.history.record(lr, weight_decay)

    def flush(self, weight: Tensor) -> None:
        """Bring every row up to now and store it.  (What follows may differ in the last bits from a run that did not.)"""
        if not self.is_current:
            dense, state = self.dense(weight), self.settled_state(weight)
            weight.copy_(dense)
            self.load_state(state)

    def change_options(self, weight: Tensor, betas: tuple[float, float], eps: float) -> None:
        """Go on with other betas or another eps: steps missed so far are made up with the old ones first."""
        self.flush(weight)
        self.load_state({**self.stored_state(), "betas": betas, "eps": eps})

    # The parts

    def _claim(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Return the slots of distinct rows, giving one to each row that had none."""
        self._reserve(len(rows))
        slots = self.slot_of_row[rows].long()
        fresh = slots == 0
        slots = torch.where(fresh, self.used - 1 + fresh.cumsum(0), slots)
        self.slot_of_row[rows] = slots.int()
        self.row_of_slot[slots] = rows
        self.last_step[slots] = self.last_step[slots].masked_fill_(
            fresh, self.history.since
        )  # a `where` would wait for a GPU
        if self.master is not None:
            self.master[slots] = torch.where(
                fresh[:, None], weight[rows].float(), self.master[slots]
            )
        self.used += fresh.sum()
        self.used_at_most = min(self.used_at_most + len(rows), self.shape[0] + 1)
        return slots

    def _reserve(self, count: int) -> None:
        """Make room for `count` more slots.  The device is asked how many are in use only when that is close."""
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
        """Return the block of just these rows that the forward left, if it did and nothing has happened since."""
        memo, self.scratch.memo = self.scratch.memo, None
        valid = memo is not None and (memo.step, memo.version) == (self.step_count, weight._version)
        return memo.block if valid and torch.equal(memo.rows, rows) else None

    def _current(
        self,
        weight: Tensor,
        rows: Tensor,
        slots: Tensor,
        block: Block | None = None,
        *,
        ready: bool = False,
    ) -> Iterator[tuple[slice, Tensor, Tensor, Block]]:
        """Yield rows and slots, on a CPU some at a time, with copies of their parameters and moments brought up to now.

        The copies are made in `block`, if it is given, and left there; if it is `ready` they are there already.
        """
        size = self._rows_at_once if self.device.type == "cpu" else max(1, len(rows))
        whole = block or self.scratch.take(min(size, len(rows)), min(size, len(rows)), self.exp_avg)
        last_step = self.last_step[slots]
        coefficients = (
            self.rules.coefficients(last_step, size)
            if self.missed_steps == "exact" and not ready
            else []
        )
        for i, start in enumerate(range(0, len(rows), size)):
            part = slice(start, min(start + size, len(rows)))
            at, to = rows[part], slots[part]
            copies = whole.part(part if block else slice(len(at)))
            if not ready:
                self._gather(weight, at, to, copies)
                if self.missed_steps == "exact":
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
