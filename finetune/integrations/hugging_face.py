"""The factory's optimizers in `transformers.Trainer` and subclasses such as TRL's `SFTTrainer`.

The protocol is that of `optimizer_cls_and_kwargs` in transformers 5 (`Trainer.create_optimizer`). A
first element that is not a torch Optimizer class is called as `first()(model, **kwargs)`.
`args.learning_rate` and `args.weight_decay` apply, with the values that they have when training
starts. So do `args.adam_beta1`, `adam_beta2` and `adam_epsilon` if they were changed. `args.optim`
and `args.optim_args` are ignored.

These trainers compute the norm of the gradients at every step, even with `max_grad_norm=0`. The
function that they use refuses sparse gradients. So an optimizer that needs row-sparse gradients is
set by `use_optimizer`, which also replaces that function.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from finetune.errors import UserError
from finetune.integrations.accelerate import clip_rows
from finetune.optim import LazyAdamW, build_optimizer, check_optimizer


class BuildOptimizer:
    """The first element of `optimizer_cls_and_kwargs`, as `optimizer_factory` returns it.

    An instance is a function of the model. A Trainer calls it when training starts, and again for
    each trial of a hyperparameter search.
    """

    def __call__(
        self, model: nn.Module, *, name: str, args: Any, trainer: Any = None, **options: Any
    ) -> torch.optim.Optimizer:
        """Return the optimizer called `name` for `model`, by the values that `args` has now.

        With a `trainer` its own arguments count, and its accelerator clips row-sparse gradients
        from now on: a trial has new ones. Raises UserError as `build_optimizer` does, and if the
        model's gradients would be row-sparse where they cannot be.
        """
        if trainer is not None:
            args = trainer.args
            clip_rows(trainer.accelerator)
        optimizer = build_optimizer(model, name, **_with_arguments(args, options))
        tables = [
            label
            for label, module in model.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            and module.sparse
            and module.weight.requires_grad
        ]
        why_no_rows = _why_no_rows(name, trainer)
        if why_no_rows and tables:
            if isinstance(optimizer, LazyAdamW):
                optimizer.release()
            raise UserError(
                f"{name} would train {', '.join(tables)} by row-sparse gradients, {why_no_rows}"
            )
        return optimizer


def optimizer_factory(
    name: str, args: Any, **options: Any
) -> tuple[type[BuildOptimizer], dict[str, Any]]:
    """Return a Trainer's `optimizer_cls_and_kwargs`, for an optimizer whose gradients are dense.

    `args` are the Trainer's (TrainingArguments, SFTConfig ...), and are read when training starts.
    `options` are those of `build_optimizer`. Raises UserError for anything that build_optimizer
    would refuse, and if lr or weight_decay is among the options. When training starts, a UserError
    is raised if the model's gradients would be row-sparse.
    """
    for option, argument in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if option in options:
            raise UserError(
                f"{option} was given to the optimizer, but a Trainer's is args.{argument}. "
                "Set it only there"
            )
    check_optimizer(name, _with_arguments(args, options))
    return BuildOptimizer, {"name": name, "args": args, **options}


def use_optimizer(trainer: Any, name: str, **options: Any) -> None:
    """Set the optimizer called `name` on `trainer`. Call it before `trainer.train()`.

    Row-sparse gradients are supported. `options` are those of `optimizer_factory`. Gradients are
    clipped to args.max_grad_norm, dense and row-sparse ones together. `trainer.args` are read when
    training starts, and for each trial of `trainer.hyperparameter_search`.

    Raises UserError as optimizer_factory does, if the trainer already has an optimizer, and under
    DeepSpeed. When training starts, a UserError is raised if FSDP, DataParallel or NCCL would come
    between the optimizer and the table's rows.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise UserError(
            "the trainer has an optimizer already. "
            "Make it without optimizers and optimizer_cls_and_kwargs"
        )
    if trainer.is_deepspeed_enabled:
        raise UserError(
            f"DeepSpeed brings an optimizer of its own, which would replace {name}. "
            "Choose the optimizer in DeepSpeed's config"
        )
    factory, settings = optimizer_factory(name, trainer.args, **options)
    trainer.optimizer_cls_and_kwargs = (factory, {**settings, "trainer": trainer})


def _why_no_rows(name: str, trainer: Any) -> str:
    """Return why gradients cannot be row-sparse and what to do, or ""."""
    if trainer is None:
        return (
            "which the trainer's clipping refuses. Make the trainer without "
            "optimizer_cls_and_kwargs, then call "
            f"finetune.integrations.hugging_face.use_optimizer(trainer, {name!r})."
        )
    whole = trainer.accelerator.distributed_type.value in ("NO", "MULTI_CPU")
    if whole and trainer.args.n_gpu <= 1:
        return ""
    return "which work in one process or over gloo, not with FSDP, DataParallel or NCCL. Use adamw."


def _with_arguments(args: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `build_optimizer`, with those that a Trainer's `args` set."""
    return {
        **options,
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        **_changed_adam_options(args, options),
    }


def _changed_adam_options(args: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return betas and eps if `args` changes their defaults and `options` does not set them."""
    default = {field.name: field.default for field in dataclasses.fields(args)}
    changed: dict[str, Any] = {}
    if (args.adam_beta1, args.adam_beta2) != (default["adam_beta1"], default["adam_beta2"]):
        changed["betas"] = (args.adam_beta1, args.adam_beta2)
    if args.adam_epsilon != default["adam_epsilon"]:
        changed["eps"] = args.adam_epsilon
    return {option: value for option, value in changed.items() if option not in options}
