"""The factory's optimizers in Ultralytics' trainers.

Use it as `model.train(trainer=with_factory(DetectionTrainer), optimizer="AdaGrad")`.

Ultralytics is AGPL-3.0, and none of it is imported or copied here. The user's own code passes its
trainer class in. This module makes a subclass that overrides `build_optimizer`, the one method that
gets the optimizer's name.
"""

from typing import Any

import torch
from torch import nn

from finetune.errors import UserError
from finetune.optim import build_optimizer, optimizer_info

THEIRS = ("auto", "MuSGD", "Adamax", "NAdam", "RAdam")  # names that only Ultralytics has


def with_factory(base_trainer: Any, **options: Any) -> type:
    """Return a subclass of an Ultralytics trainer whose `optimizer=` takes the factory's names.

    `options` go to `build_optimizer`; lr0, lrf, weight_decay and the warm-up are the trainer's. A
    name means the factory's rule, so "SGD" has no momentum, unlike Ultralytics' own. `momentum=`
    and its warm-up go to the optimizers that have momentum by their rule, and never to Adam's
    beta1. The names in THEIRS are still Ultralytics' optimizers.

    Raises UserError if `base_trainer` is not a trainer, or if `options` sets what the trainer sets.
    When training starts, a UserError is raised as by build_optimizer.
    """
    if not callable(getattr(base_trainer, "build_optimizer", None)):
        raise UserError(
            f"with_factory was given {base_trainer!r}; "
            "it takes an Ultralytics trainer class such as DetectionTrainer"
        )

    for option, argument in (
        ("lr", "lr0"),
        ("weight_decay", "weight_decay"),
        ("momentum", "momentum"),
    ):
        if option in options:
            raise UserError(
                f"{option} was given to the optimizer, but train(...) has {argument}=. "
                "Set it only there"
            )

    def build(
        self: Any,
        model: nn.Module,
        name: str = "auto",
        lr: float = 0.001,
        momentum: float = 0.9,
        decay: float = 1e-5,
        iterations: float = 1e5,
    ) -> torch.optim.Optimizer:
        if name.lower() in [own.lower() for own in THEIRS]:
            return base_trainer.build_optimizer(self, model, name, lr, momentum, decay, iterations)
        settings = {**options, "lr": lr, "weight_decay": decay}
        has_momentum = bool(optimizer_info(name).options.get("momentum"))
        if has_momentum:
            settings["momentum"] = momentum
        optimizer = build_optimizer(_tagged_groups(model), name, **settings)
        if not has_momentum:
            _keep(optimizer, "momentum")
        return optimizer

    return type(f"Factory{base_trainer.__name__}", (base_trainer,), {"build_optimizer": build})


def _tagged_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups with the tags that the trainer's warm-up and weight decay use.

    The tags are "weight", "bn" and "bias".
    """
    groups: dict[str, dict[str, Any]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            tag = "bias" if name == "bias" else "bn" if parameter.ndim <= 1 else "weight"
            no_decay = {} if tag == "weight" else {"weight_decay": 0.0}
            group = groups.setdefault(
                tag, {"params": [], "name": tag, "param_group": tag, **no_decay}
            )
            group["params"].append((f"{module_name}.{name}".lstrip("."), parameter))
    return list(groups.values())


def _keep(optimizer: torch.optim.Optimizer, option: str) -> None:
    """Set `option` back before every step.

    The warm-up writes momentum into every group that has such a key, also into that of plain SGD.
    """
    values = [group.get(option) for group in optimizer.param_groups]

    def restore(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, value in zip(optimizer.param_groups, values):
            if value is not None:
                group[option] = value

    optimizer.register_step_pre_hook(restore)
