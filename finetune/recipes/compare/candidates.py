"""The optimizers of a comparison: which they are, and what of one optimizer section each of them is given.

Floor 5.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from finetune.config import RunConfig
from finetune.config.schema import OptimizerSection
from finetune.config.yaml12 import parse
from finetune.errors import UserError, did_you_mean
from finetune.optim import check_optimizer, optimizer_info
from finetune.recipes.build.optimizer import optimizer_options
from finetune.run.wording import listed

DEFAULT = ("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "lazy_adamw")


def take_list(overrides: Sequence[str], key: str) -> tuple[list[Any] | None, list[str]]:
    """The list that an override `key=[…]` gives, or None, and the other overrides."""
    found, others = None, []
    for override in overrides:
        name, _, text = override.partition("=")
        try:
            value = parse(text) if name.strip() == key else None
        except yaml.YAMLError:
            value = None  # the config's own reader says what is wrong with it
        if isinstance(value, list):
            found = value
        else:
            others.append(override)
    return found, others


def candidates(names: Sequence[Any]) -> list[str]:
    """The optimizers' own names. Raises UserError where one is unknown, not installed, or named twice."""
    infos = [optimizer_info(str(name)) for name in names]
    for info in infos:
        info.load()
    found = [info.name for info in infos]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise UserError(
            f"optimizer.name names {listed(twice)} twice: every optimizer is compared once"
        )
    if len(found) < 2:
        raise UserError(
            f"a comparison needs at least two optimizers, and optimizer.name={found} names {len(found)}: "
            "give a list, or use `finetune tune` for one"
        )
    return found


def section_for(
    section: OptimizerSection, name: str, *, lr: float, weight_decay: float | None = None
) -> OptimizerSection:
    """The section with another optimizer, learning rate and weight decay, and of its options those that this optimizer takes."""
    takes = optimizer_info(name).options
    decay = section.weight_decay if weight_decay is None else weight_decay
    given = section.model_dump(exclude={"name", "lr", "weight_decay"})
    known = {
        key: value
        for key, value in given.items()
        if key in OptimizerSection.model_fields or key in takes
    }
    return OptimizerSection(
        **known, name=name, lr=lr, weight_decay=decay if "weight_decay" in takes else None
    )


def check_candidates(config: RunConfig, names: Sequence[str]) -> list[str]:
    """Notes on which option goes to which optimizer. Raises UserError for options that no optimizer takes, or values it refuses."""
    section, notes = config.optimizer, []
    for override in section.overrides:
        if "lr" in override:
            raise UserError(
                "optimizer.overrides sets an lr, which would stay as it is while the learning rate is searched: remove it"
            )
    given = [*section.options, *(["weight_decay"] if section.weight_decay else [])]
    for option in given:
        takers = [name for name in names if option in optimizer_info(name).options]
        others = [name for name in names if name not in takers]
        if not takers:
            known = sorted({key for name in names for key in optimizer_info(name).config_options})
            near = did_you_mean(option, known)
            raise UserError(
                f"none of {listed(list(names))} takes {option!r}; they take {', '.join(known)}{near}"
            )
        if others:
            notes.append(
                f"{option} is given to {listed(takers)} alone: {listed(others)} {_does(others)} not take it."
            )
    for name in names:
        changed = config.model_copy(update={"optimizer": section_for(section, name, lr=section.lr)})
        check_optimizer(name, optimizer_options(changed))
    return notes


def _does(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"
