"""What a lazily stepped table knows between two steps, and which of its rows it shows."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.errors import UserError


class Showing(Enum):
    """Which rows a table shows, and to whom. A lookup always gives rows as of now.

    | showing  | when                | the weight holds | the state dicts show |
    |----------|---------------------|------------------|----------------------|
    | CURRENT  | as a rule           | rows as stored   | rows as of now       |
    | DEFERRED | inside `deferred()` | rows as stored   | rows as stored       |
    | FLUSHED  | inside `flushed()`  | rows as of now   | rows as of now       |

    The state dicts are those of the model and of the optimizer, which always go together.
    """

    CURRENT = "current"
    DEFERRED = "deferred"
    FLUSHED = "flushed"


def same(one: Tensor, other: Tensor) -> Tensor:
    """Return which values are the same; one that is no number is the same as another such."""
    return (one == other) | (one.isnan() & other.isnan())


class Witness(NamedTuple):
    """Some rows of the weight that a state belongs to, by which it is known again; see saved.py."""

    rows: Tensor  # [w] int64
    values: Tensor  # [w, d]
    mixed: Tensor | None  # [w, d]: their values in a mixed pair; states of before do not have them

    def found_in(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return which rows [w] are as they should be in `weight`, and which as in a mixed pair."""
        if self.values.shape[1] != weight.shape[1] or (self.rows >= len(weight)).any():
            none = torch.zeros_like(self.rows, dtype=torch.bool)
            return none, none
        found = weight.detach()[self.rows.to(weight.device)]
        right = same(found, self.values.to(weight.device)).all(1)
        if self.mixed is None:
            return right, right
        return right, same(found, self.mixed.to(weight.device)).all(1)


class RowState(NamedTuple):
    """What a table of V rows [V, d] knows after some steps, of which n rows have had a gradient.

    `as_dict` gives the entry of the optimizer's state dict; its keys are these names.
    """

    step: Tensor  # [] float64: the steps applied
    rows: Tensor  # [n] int64: the rows that have had a gradient
    last_step: Tensor  # [n] int64: the step that each of them was brought up to
    exp_avg: Tensor  # [n, d]
    exp_avg_sq: Tensor  # [n, d]
    lr: Tensor  # [h] float64: of the steps since all rows were up to date
    weight_decay: Tensor  # [h] float64: of the same steps
    betas: tuple[float, float]
    eps: float
    master: Tensor | None = None  # [n, d] float32: of a weight in bfloat16 or float16
    skipped: bool | None = None  # True: rows keep what they missed for good (missed_steps="skip")
    rule_masses: Tensor | None = None  # [h + 1, nodes]: see `missed_steps.GaussRules`
    rule_shifts: Tensor | None = None  # [h + 1, nodes]
    window_masses: Tensor | None = None  # [window, nodes] float64
    window_nodes: Tensor | None = None  # [window, nodes] float64
    witness_rows: Tensor | None = None  # [w] int64: rows of the weight that was saved with this
    witness: Tensor | None = None  # [w, d]: their values
    mixed_witness: Tensor | None = None  # [w, d]: what they would be in a mixed pair

    def witness_for(self, weight: Tensor) -> "Witness | None":
        """Return the witness in the dtype of `weight`; a state from elsewhere has none."""
        if self.witness_rows is None or self.witness is None:
            return None
        mixed = None if self.mixed_witness is None else self.mixed_witness.to(weight)
        return Witness(self.witness_rows.to(weight.device), self.witness.to(weight), mixed)

    @classmethod
    def up_to_date(
        cls,
        step: int,
        rows: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        betas: tuple[float, float],
        eps: float,
        master: Tensor | None = None,
    ) -> "RowState":
        """Return a state in which no row has missed a step, so that no history is needed."""
        return cls(
            step=torch.tensor(step, dtype=torch.float64, device="cpu"),
            rows=rows,
            last_step=torch.full_like(rows, step),
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            lr=torch.empty(0, device="cpu"),
            weight_decay=torch.empty(0, device="cpu"),
            betas=betas,
            eps=eps,
            master=master,
        )

    def under(self, missed_steps: str) -> "RowState":
        """Return the state for a table with this rule for missed steps.

        What was skipped before stays skipped. Raises UserError if a step that a row was to make up
        would be skipped.
        """
        if missed_steps == "skip" and not self.skipped and len(self.lr):
            raise UserError(
                "the optimizer's state has rows that are still to make up steps, which "
                "missed_steps='skip' would drop. Go on with missed_steps='exact'"
            )
        if missed_steps == "skip" or not self.skipped:
            return self
        return RowState.up_to_date(
            int(self.step),
            self.rows,
            self.exp_avg,
            self.exp_avg_sq,
            betas=self.betas,
            eps=self.eps,
            master=self.master,
        )

    @classmethod
    def before_the_first_step(
        cls, width: int, *, betas: tuple[float, float], eps: float
    ) -> "RowState":
        """Return the state of a table of this width that no step was applied to."""
        rows = torch.empty(0, dtype=torch.int64, device="cpu")
        empty = torch.empty(0, width, device="cpu")
        return cls.up_to_date(0, rows, empty, empty, betas=betas, eps=eps, master=empty)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "RowState":
        """Return the state that `as_dict` gave, or one of another origin with these keys."""
        return cls(**{key: value for key, value in state.items() if key in cls._fields})

    def as_dict(self) -> dict[str, Any]:
        """Return what is known, by name, as an optimizer's state dict holds it."""
        return {key: value for key, value in self._asdict().items() if value is not None}
