"""AdamW for rows that are not stepped every time: the history, one step, and the missed steps.

Everything here works on gathered rows [k, d] in float32 or float64, and knows nothing of tables,
modules or optimizers. The one arithmetic, `adamw_step_`, is that of
torch.optim.AdamW(foreach=False), operation for operation (Loshchilov and Hutter, "Decoupled Weight
Decay Regularization", https://arxiv.org/abs/1711.05101). A missed step is such a step with a zero
gradient. There are two ways to make up the steps missed since each row's `last_step` [k] (int64):

- `GaussRules`: all at once, in a constant number of operations (see gauss.py).
- `replay_`: one by one, bitwise what dense AdamW would have done.

Every operation is one that rounds an element in the same way at every place in a tensor. So a row
has one value, no matter which other rows are gathered with it. (torch's fused kernel rounds
exp_avg_sq otherwise in its scalar tail than in its vector body. So it is used only for rows of
whole cache lines, which leave no tail.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finetune.compute.exact import float64_device
from finetune.optim.lazy.gauss import grow_rule, horizon, missed_atoms, nodes_needed
from finetune.optim.lazy.scratch import outlives_inference_mode
from finetune.optim.lazy.state import RowState

_LONGEST_HORIZON = 4096
_NOTHING = 1e-20  # of a first moment is 0: a CPU is slow with what is left, subnormal numbers
_MOST_NODES = 24
_TOLERANCE = 1e-6  # of what a row missed; float64 rows have 1e-9 if _MOST_NODES reach it


@dataclass
class History:
    """The steps applied since step `since`, when every row was up to date, as Python floats.

    `lr[i]` and `weight_decay[i]` belong to step since + 1 + i. `log_decay[i]` is the sum of
    log(1 - lr weight_decay) over the steps before it.
    """

    betas: tuple[float, float]
    eps: float
    since: int = 0
    lr: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    log_decay: list[float] = field(default_factory=lambda: [0.0])

    @property
    def step(self) -> int:
        """The steps applied so far, from the beginning of training."""
        return self.since + len(self.lr)

    def record(self, lr: float, weight_decay: float) -> None:
        """Note that a step was applied."""
        self.lr.append(lr)
        self.weight_decay.append(weight_decay)
        self.log_decay.append(self.log_decay[-1] + math.log1p(-lr * weight_decay))


def adamw_step_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    work: Tensor | None = None,
    fused: bool = False,
) -> None:
    """Apply AdamW's step number `step` (from 1) in place.

    All tensors are [k, d], but `grad` may be a broadcast zero. `work` is overwritten. `fused`: use
    torch's fused kernel, which does the same to rounding in one pass over the memory. It needs
    every tensor, also `grad`, to be contiguous.
    """
    beta1, beta2 = betas
    if fused:
        number = torch.full((), float(step), dtype=torch.float32, device=param.device)
        torch._fused_adamw_(
            [param], [grad], [exp_avg], [exp_avg_sq], [], [number], amsgrad=False, maximize=False,
            lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2, eps=eps,
        )  # fmt: skip
        return
    if weight_decay != 0:
        param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = torch.sqrt(exp_avg_sq, out=work).div_((1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-(lr / (1 - beta1**step)))


def replay_(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last_step: Tensor, history: History
) -> None:
    """Bring rows [k, d] up to history.step in place, at the cost of every step missed."""
    order = last_step.argsort(stable=True)  # so that the rows to be stepped come first
    p, m, v = (x[order] for x in (param, exp_avg, exp_avg_sq))
    zero = param.new_zeros(())
    first = int(last_step.min()) + 1
    steps = torch.arange(first, history.step + 1, device=last_step.device)
    options: dict[str, Any] = {"betas": history.betas, "eps": history.eps}
    for step, behind in zip(steps.tolist(), torch.searchsorted(last_step[order], steps).tolist()):
        i = step - 1 - history.since
        options |= {"lr": history.lr[i], "weight_decay": history.weight_decay[i]}
        adamw_step_(p[:behind], m[:behind], v[:behind], zero, step=step, **options)
    for x, replayed in zip((param, exp_avg, exp_avg_sq), (p, m, v)):
        x[order] = replayed


@dataclass
class RowCoefficients:
    """The numbers with which rows [k, d] are brought up to date."""

    masses: Tensor  # [k, nodes]
    shifts: Tensor  # [k, nodes]: eps / node
    decay: Tensor  # [k, 1]: minus one
    exp_avg: Tensor  # [k, 1]
    exp_avg_sq: Tensor  # [k, 1]

    def catch_up_(
        self,
        param: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        work: Sequence[Tensor | None] = (None,) * 3,
    ) -> None:
        """Bring parameters and moments [k, d] up to date in place.

        `work`, three such tensors, is overwritten.
        """
        root = torch.sqrt(exp_avg_sq, out=work[0])
        nodes = zip(self.masses.split(1, dim=1), self.shifts.split(1, dim=1), strict=True)
        mass, shift = next(nodes)
        denominator = torch.add(root, shift, out=work[1])
        drift = torch.div(mass, denominator, out=work[2])
        for mass, shift in nodes:
            drift.addcdiv_(mass, torch.add(root, shift, out=denominator))
        param.addcmul_(param, self.decay).addcmul_(drift, exp_avg, value=-1)
        exp_avg.mul_(self.exp_avg)
        exp_avg_sq.mul_(self.exp_avg_sq)


class GaussRules:
    """The Gauss rules of every step at which a row may have been left, on the device of the rows.

    `masses[i]` and `shifts[i]` are for a row that was left at step since + i. After the horizon a
    missed step adds only decay to a row's sum. So each step changes only the rules of the last
    `length` steps, the window. The window is kept on the host in float64 and grown from the history
    alone, so that the device is not asked which rows need what.
    """

    def __init__(self, history: History, *, dtype: torch.dtype, device: torch.device) -> None:
        self.history, self.device = history, device
        self.tolerance = 1e-9 if dtype == torch.float64 else _TOLERANCE
        self.most = nodes_needed(1, history.betas, self.tolerance, _MOST_NODES)[0]
        self.length = horizon(*history.betas, self.tolerance / 100)
        self.known = history.since  # rules are up to date as of this step
        self.window_masses = torch.zeros(0, 1, dtype=torch.float64, device="cpu")
        self.window_nodes = torch.ones(0, 1, dtype=torch.float64, device="cpu")
        self.masses = torch.zeros(1, self.most, dtype=dtype, device=device)
        self.shifts = torch.ones(1, self.most, dtype=dtype, device=device)  # eps / node
        self.log_decay = torch.zeros(1, dtype=torch.float64, device=float64_device(device))

    @staticmethod
    def supports(betas: tuple[float, float]) -> bool:
        """Return whether a rule gives the sum over missed steps to within 1e-6 of it.

        It does if beta1 < sqrt(beta2), by a margin.
        """
        beta1, beta2 = betas
        return (
            0 < beta2 < 1
            and 0 <= beta1 < math.sqrt(beta2)
            and (beta1 == 0 or horizon(beta1, beta2, 1e-10) <= _LONGEST_HORIZON)
            and nodes_needed(1, betas, _TOLERANCE, _MOST_NODES)[1] <= _TOLERANCE
        )

    def coefficients(self, last_step: Tensor, size: int) -> list[RowCoefficients]:
        """Return what brings rows from `last_step` [k] up to history.step, for `size` at a time."""
        self.grow()
        if not len(last_step):
            return []
        history, (beta1, beta2) = self.history, self.history.betas
        index = last_step - history.since
        exact = index.to(self.log_decay.device)
        missed = (len(history.lr) - exact).double()[:, None]
        end = (exact + self.length).clamp_(max=len(history.lr))
        now = history.log_decay[-1]
        columns = (
            self.masses[index] * torch.exp(now - self.log_decay[end]).to(self.masses)[:, None],
            self.shifts[index],
            torch.expm1(now - self.log_decay[exact]).to(self.masses)[:, None],
            torch.nn.functional.threshold(torch.pow(beta1, missed), _NOTHING, 0.0).to(self.masses),
            torch.pow(beta2, missed).to(self.masses),
        )
        parts = zip(*(column.split(size) for column in columns), strict=True)
        return [
            RowCoefficients(masses[:, :width], shifts[:, :width], *others)
            for width, (masses, shifts, *others) in zip(
                self._widths(last_step, size), parts, strict=True
            )
        ]

    def _widths(self, last_step: Tensor, size: int) -> list[int]:
        """Return how many nodes each `size` rows need; on a device that one must wait for, all."""
        if self.device.type != "cpu":
            return [self.most] * -(-len(last_step) // size)
        # The longest missed row decides. A row never stepped (step 0) does not drift.
        window, steps = self._window_start(self.history.step), last_step.tolist()
        longest = [
            min(filter(None, steps[i : i + size]), default=window)
            for i in range(0, len(steps), size)
        ]
        return [self._nodes(min(step, window)) for step in longest]

    @outlives_inference_mode
    @torch.no_grad()
    def grow(self) -> None:
        """Take the steps that were recorded since the last call into the rules."""
        history = self.history
        for step in range(self.known + 1, history.step + 1):
            i = step - history.since
            self._reserve(i + 1)
            self.log_decay[i].fill_(history.log_decay[i])
            first = self._window_start(step)
            missed = torch.arange(step - first, 0, -1, dtype=torch.float64, device="cpu")
            atoms = missed_atoms(step, missed, history.betas, history.lr[i - 1])
            dropped = len(self.window_masses) + 1 - len(missed)
            masses = torch.nn.functional.pad(
                self.window_masses[dropped:]
                * (1 - history.lr[i - 1] * history.weight_decay[i - 1]),
                (0, 0, 0, 1),
            )
            nodes = torch.nn.functional.pad(self.window_nodes[dropped:], (0, 0, 0, 1), value=1.0)
            self.window_masses, self.window_nodes = grow_rule(
                masses, nodes, missed, *atoms, self._nodes(first)
            )
            self._publish(first - history.since)
            self.known = step

    def _window_start(self, step: int) -> int:
        """Return the first step in the window that ends with rows left at step - 1.

        The whole window has as many nodes as that first step needs.
        """
        return max(self.history.since, step - self.length)

    def _nodes(self, last_step: int) -> int:
        return nodes_needed(last_step, self.history.betas, self.tolerance, self.most)[0]

    def _publish(self, index: int) -> None:
        """Copy the window to the device, as rows from `index`."""
        pad = (0, self.most - self.window_nodes.shape[1])
        for table, window, value in (
            (self.masses, self.window_masses, 0.0),
            (self.shifts, self.history.eps / self.window_nodes, 1.0),
        ):
            source = torch.nn.functional.pad(window.to(table.dtype), pad, value=value)
            if self.device.type == "cuda":  # a copy from pageable memory would wait for the device
                source = source.pin_memory()
            table[index : index + len(source)].copy_(source, non_blocking=True)

    def _reserve(self, length: int) -> None:
        if length > len(self.log_decay):
            pad = max(length, 2 * len(self.log_decay)) - len(self.log_decay)
            self.log_decay = torch.nn.functional.pad(self.log_decay, (0, pad))
            self.masses = torch.nn.functional.pad(self.masses, (0, 0, 0, pad))
            self.shifts = torch.nn.functional.pad(self.shifts, (0, 0, 0, pad), value=1.0)

    def add_to(self, state: RowState) -> RowState:
        """Return `state`, which has the same history, together with what `load` needs."""
        self.grow()
        length = len(self.history.lr) + 1
        return state._replace(
            rule_masses=self.masses[:length],
            rule_shifts=self.shifts[:length],
            window_masses=self.window_masses,
            window_nodes=self.window_nodes,
        )

    def load(self, state: RowState) -> None:
        """Take over the rules in a state with the same history; if it has none, they are grown."""
        if state.rule_masses is None or state.rule_shifts is None:
            return
        if state.rule_masses.shape[1] != self.most:  # of another tolerance
            return
        assert state.window_masses is not None
        assert state.window_nodes is not None
        length = len(state.rule_masses)
        self._reserve(length)
        self.masses[:length], self.shifts[:length] = state.rule_masses, state.rule_shifts
        self.window_masses = state.window_masses.cpu().double()
        self.window_nodes = state.window_nodes.cpu().double()
        self.log_decay[:length] = torch.tensor(
            self.history.log_decay, dtype=torch.float64, device="cpu"
        )
        self.known = self.history.step
