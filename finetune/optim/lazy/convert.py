"""A run can change from torch.optim.AdamW to LazyAdamW and back, on the same trajectory."""

from typing import Any

import torch
from torch import Tensor

from finetune.optim.lazy.adamw import LazyAdamW
from finetune.optim.lazy.eligible import check_rule, floats
from finetune.optim.lazy.missed_steps import GaussRules
from finetune.optim.lazy.state import RowState
from finetune.optim.lazy.table import RowTable
from finetune.optim.stamp import KEY, check_sizes, rule_of

# What else goes over with a parameter group:
_NOT_OPTIONS = ("params", "param_names", "name", "initial_lr")


@torch.no_grad()
def to_adamw_state(optimizer: LazyAdamW) -> dict[str, Any]:
    """Return the state for a torch.optim.AdamW over the same parameters in the same groups.

    Flushes `optimizer`, so the weights become those that AdamW would have. To go on in this
    process, also call `optimizer.release()`, which makes the embeddings give dense gradients again.
    """
    optimizer.flush()
    state = optimizer.state_dict()
    for index, weight in optimizer.registered_weights().items():
        if index in state["state"]:
            of_rows = RowState.from_dict(state["state"][index])
            state["state"][index] = {
                "step": of_rows.step.float(),
                "exp_avg": _dense(weight, of_rows.rows, of_rows.exp_avg),
                "exp_avg_sq": _dense(weight, of_rows.rows, of_rows.exp_avg_sq),
            }
    options = torch.optim.AdamW([torch.zeros(1, device="cpu")]).state_dict()["param_groups"][0]
    known = {*options, *_NOT_OPTIONS}
    groups = [
        {**options, **{key: value for key, value in group.items() if key in known}}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


@torch.no_grad()
def from_adamw_state(optimizer: LazyAdamW, state: dict[str, Any]) -> None:
    """Load the state dict of a torch.optim.AdamW over the same parameters in the same groups.

    It does not load the weights. Rows of registered tables whose moments are all zero get no state.
    Raises UserError for a state with amsgrad, of Adam with weight decay, or of other groups.
    """
    for group in state["param_groups"]:
        check_rule(group)
    own = optimizer.state_dict()["param_groups"]
    check_sizes(own, state["param_groups"])
    entries = dict(state["state"])
    index_of = [index for group in state["param_groups"] for index in group["params"]]
    for position in optimizer.registered_weights():
        entry = entries.pop(index_of[position], None)
        if entry is not None:
            group = next(
                group for group in state["param_groups"] if index_of[position] in group["params"]
            )
            entries[index_of[position]] = _row_state(entry, group)
    shared = {"lr", "betas", "eps", "weight_decay", "maximize", *_NOT_OPTIONS}
    kept = [
        {key: value for key, value in group.items() if key in shared}
        for group in state["param_groups"]
    ]
    groups = [{**mine, **theirs} for mine, theirs in zip(own, kept, strict=True)]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


@torch.no_grad()
def adapt_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return `state`, of a dense or a lazy optimizer of one rule, as one that `optimizer` takes.

    It is called after the weights that belong to `state` were loaded. If the state is of a lazily
    stepped table whose rows lag, and `optimizer` is dense, the missed steps of the weight are made
    up here, in place.
    """
    parameters = [param for group in optimizer.param_groups for param in group["params"]]
    lazy = optimizer.registered_weights() if isinstance(optimizer, LazyAdamW) else {}
    entries = dict(state["state"])
    groups = {index: group for group in state["param_groups"] for index in group["params"]}
    for position, index in enumerate(groups):
        entry = entries.get(index)
        if not entry or position >= len(parameters):
            continue
        if position in lazy and "last_step" not in entry:
            entries[index] = _row_state(entry, groups[index])
        elif position not in lazy and "last_step" in entry:
            entries[index] = _caught_up(parameters[position], RowState.from_dict(entry))
    own = optimizer.defaults.get(KEY, "")
    if not own:
        return {**state, "state": entries}
    kernels: list[dict[str, Any]] = [  # torch puts step counts where the loaded group's wants them
        {key: group[key] for key in ("fused", "capturable") if key in group}
        for group in optimizer.param_groups
    ]
    saved = state["param_groups"]
    groups_now = [
        {**group, **kernel, **({KEY: own} if rule_of(group.get(KEY, "")) == rule_of(own) else {})}
        for group, kernel in zip(saved, [*kernels, *({} for _ in saved[len(kernels) :])])
    ]
    return {"state": entries, "param_groups": groups_now}


def _caught_up(weight: Tensor, state: RowState) -> dict[str, Tensor]:
    """Bring `weight` up to now, and return the state that torch.optim.AdamW would have.

    Of a shard (a DTensor) every process must call it, and gets its part of the state.
    """
    if hasattr(weight, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # here: it takes a second to import

        def part_of(full: Tensor) -> Tensor:
            mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
            return distribute_tensor(full, mesh, placements, src_data_rank=None)

        whole = weight.full_tensor()
        moments = _caught_up(whole, state)
        weight.copy_(part_of(whole))
        return {key: part_of(value) if value.ndim else value for key, value in moments.items()}
    mode = "exact" if GaussRules.supports(state.betas) and state.eps > 0 else "replay"
    table = RowTable(weight, missed_steps=mode, betas=state.betas, eps=state.eps)
    if table.master is not None and state.master is None:
        state = state._replace(master=weight[state.rows].float())
    table.start(weight, state)
    table.flush(weight)
    now = table.stored_state()
    return {
        "step": now.step.float(),
        "exp_avg": _dense(weight, now.rows, now.exp_avg),
        "exp_avg_sq": _dense(weight, now.rows, now.exp_avg_sq),
    }


def _dense(weight: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    dense = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    return dense.index_copy_(0, rows, values.to(weight.dtype))


def _row_state(entry: dict[str, Tensor], group: dict[str, Any]) -> dict[str, Any]:
    exp_avg, exp_avg_sq = entry["exp_avg"], entry["exp_avg_sq"]
    rows = (exp_avg.any(1) | exp_avg_sq.any(1)).nonzero()[:, 0]
    options: dict[str, Any] = {"betas": floats(group["betas"]), "eps": group["eps"]}
    return RowState.up_to_date(
        int(entry["step"]), rows, exp_avg[rows], exp_avg_sq[rows], **options
    ).as_dict()
