"""The optimizers of a comparison, and the options that each of them gets from one config."""

from collections.abc import Sequence
from typing import Any

from finetune.config import RunConfig
from finetune.config.loading import validate
from finetune.config.schema import OptimizerSection
from finetune.errors import UserError, did_you_mean
from finetune.optim import check_optimizer, optimizer_info
from finetune.recipes.build.optimizer import may_be_lazy, optimizer_options
from finetune.run.wording import listed

DEFAULT_OPTIMIZERS = ("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "lazy_adamw")


def optimizer_names(names: Sequence[Any]) -> list[str]:
    """Return the names of the optimizers as they are listed, from those that a user gave.

    Raises UserError for one that is unknown, not installed or named twice, and for fewer than two.
    """
    infos = [optimizer_info(str(name)) for name in names]
    for info in infos:
        info.load()
    found = [info.name for info in infos]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise UserError(
            f"optimizer.name names {listed(twice)} twice, and a comparison runs every optimizer "
            "once. Name each optimizer once"
        )
    if len(found) < 2:
        raise UserError(
            f"a comparison needs at least two optimizers, and optimizer.name={found} names "
            f"{len(found)}. Give a list, or use `finetune tune` for one optimizer"
        )
    return found


def section_for(
    section: OptimizerSection, name: str, *, lr: float, weight_decay: float | None = None
) -> OptimizerSection:
    """Return the section with another optimizer, learning rate and weight decay.

    Of its options it keeps those that the optimizer takes. Raises UserError for a value that the
    section does not take.
    """
    takes = optimizer_info(name).options
    decay = section.weight_decay if weight_decay is None else weight_decay
    given = section.model_dump(exclude={"name", "lr", "weight_decay"})
    known = {
        key: value
        for key, value in given.items()
        if key in OptimizerSection.model_fields or key in takes
    }
    searched = {"lr": lr, "weight_decay": decay if "weight_decay" in takes else None}
    return validate(OptimizerSection, {**known, "name": name, **searched}, where="optimizer")


def check_candidates(config: RunConfig, names: Sequence[str]) -> list[str]:
    """Return a note on each option that only some of the optimizers take.

    Raises UserError for an option that none of them takes, and for a value that one refuses.
    """
    section = config.optimizer
    if any("lr" in override for override in section.overrides):
        raise UserError(
            "optimizer.overrides sets an lr, which would not change while the learning rate is "
            "searched. Remove it"
        )
    given = [*section.options, *(["weight_decay"] if section.weight_decay else [])]
    notes = [_note_on(option, names) for option in given]
    for name in names:
        changed = config.model_copy(update={"optimizer": section_for(section, name, lr=section.lr)})
        check_optimizer(name, optimizer_options(changed))
        may_be_lazy(changed)  # raises if optimizer.lazy asks for what cannot be
    return [note for note in notes if note is not None]


def _note_on(option: str, names: Sequence[str]) -> str | None:
    """Return which optimizers get the option, or None if all do. Raises UserError if none does."""
    takers = [name for name in names if option in optimizer_info(name).options]
    others = [name for name in names if name not in takers]
    if not takers:
        known = sorted({key for name in names for key in optimizer_info(name).config_options})
        near = did_you_mean(option, known)
        alone = len(names) == 1
        refusal = f"{names[0]} does not take" if alone else f"none of {listed(list(names))} takes"
        they = "it takes" if alone else "they take"
        raise UserError(f"{refusal} {option!r}; {they} {', '.join(known)}{near}")
    if not others:
        return None
    do = "does" if len(others) == 1 else "do"
    return f"{option} is given to {listed(takers)} alone: {listed(others)} {do} not take it."
