"""Whether a checkpoint is of this run, and its weights and state put back in their places."""

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from finetune.errors import Border, UserError
from finetune.optim import LazyAdamW, adapt_state
from finetune.training.checkpoint import ANOTHER, as_written, load
from finetune.training.form import check_optimizer_state, has_shaped_state


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of the parameters that train, and of every buffer.

    Frozen weights come from the base model again.
    """
    frozen = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def restore_checkpoint(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> None:
    """Load weights and optimizer state into the model and the optimizer that they were saved from.

    Under an engine that shards, each process loads its shards. What has the shape of a parameter is
    sharded like that parameter. Raises UserError unless the checkpoint has every weight that trains
    and no other, each with its shape.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with stored_rows(optimizer):
        weights = model.state_dict()
        stored = load(checkpoint, "model.pt", own=lambda place: weights.get(place[0]))
        _check_weights(trainable_state(model), stored, checkpoint)
        # Frozen weights are those of the base model. A module may hold buffers that it has not
        # measured yet, so only the loading shows what the model does not have.
        _refuse_weights(
            "has, unlike the model,",
            model.load_state_dict(stored, strict=False).unexpected_keys,
            checkpoint,
        )
        stored = load(
            checkpoint,
            "optimizer.pt",
            own=lambda place: parameters[place[1]] if place[0] == "state" else None,
        )
        with as_written(checkpoint / "optimizer.pt"):
            inner = getattr(optimizer, "optimizer", optimizer)
            stored = adapt_state(inner, stored)
            check_optimizer_state(
                stored, optimizer.state_dict(), parameters, shaped=has_shaped_state(inner)
            )
        with Border(f"{checkpoint / 'optimizer.pt'} does not fit", do=ANOTHER):
            optimizer.load_state_dict(stored)


def _check_weights(wanted: Mapping[str, torch.Tensor], stored: object, checkpoint: Path) -> None:
    """Raise UserError if `stored` lacks a name or a shape of `wanted`."""
    found = stored if isinstance(stored, Mapping) else {}
    shapes = [
        name
        for name in wanted.keys() & found.keys()
        if getattr(found[name], "shape", None) != wanted[name].shape
    ]
    _refuse_weights("lacks", wanted.keys() - found.keys(), checkpoint)
    if shapes:
        name = min(shapes)
        raise UserError(
            f"in {checkpoint / 'model.pt'} {name} has another shape than "
            f"{tuple(wanted[name].shape)}, which the model needs. Take another checkpoint"
        )


def _refuse_weights(what: str, names: Collection[str], checkpoint: Path) -> None:
    if names:
        raise UserError(
            f"{checkpoint / 'model.pt'} {what} {len(names)} weights, such as {min(names)}. "
            "Take another checkpoint, or the model that it was saved from"
        )


def stored_rows(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
    """Return a context in which state dicts show the rows of a lazy table as they are stored."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.deferred() if isinstance(inner, LazyAdamW) else contextlib.nullcontext()
