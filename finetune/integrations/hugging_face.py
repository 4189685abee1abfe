"""The factory's optimizers in `transformers.Trainer` and the trainers made from it, such as TRL's `SFTTrainer`.

Floor 2. The protocol is that of `optimizer_cls_and_kwargs` in transformers 5 (`Trainer.create_optimizer`): a first element that is
no torch Optimizer class is called as `first()(model, **kwargs)`. `args.learning_rate` and `args.weight_decay` hold, and so do
`args.adam_beta1`, `adam_beta2` and `adam_epsilon` where they were changed; `args.optim` and `args.optim_args` do not count.

These trainers take the norm of the gradients at every step, also with `max_grad_norm=0`, by a function that refuses sparse ones.
So an optimizer that lives on row-sparse gradients is brought in by `use_optimizer`, which sees to that too.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from finetune.errors import UserError
from finetune.integrations.accelerate import clip_rows
from finetune.optim import LazyAdamW, build_optimizer, check_optimizer


class BuildOptimizer:
    """The first element of `optimizer_cls_and_kwargs`; an instance is a function of the model. Made by `optimizer_factory`."""

    def __call__(
        self, model: nn.Module, *, name: str, why_no_rows: str, **options: Any
    ) -> torch.optim.Optimizer:
        """Build it. Raises UserError where the model's gradients would be row-sparse and `why_no_rows` says that they may not."""
        optimizer = build_optimizer(model, name, **options)
        tables = [
            label
            for label, module in model.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            and module.sparse
            and module.weight.requires_grad
        ]
        if why_no_rows and tables:
            if isinstance(optimizer, LazyAdamW):
                optimizer.release()
            raise UserError(
                f"{name} would train {', '.join(tables)} by row-sparse gradients, and {why_no_rows}"
            )
        return optimizer


def optimizer_factory(
    name: str, args: Any, **options: Any
) -> tuple[type[BuildOptimizer], dict[str, Any]]:
    """What a Trainer takes as `optimizer_cls_and_kwargs`, for an optimizer whose gradients are dense.

    `args` are the Trainer's (TrainingArguments, SFTConfig ...); `options` are those of `build_optimizer`. Raises UserError for
    what build_optimizer would refuse, and where lr or weight_decay stand among the options; as training starts, where the model's
    gradients would be row-sparse.
    """
    for option, argument in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if option in options:
            raise UserError(
                f"{option} was given to the optimizer, but a Trainer's is args.{argument}; set it there alone"
            )
    options |= {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        **_changed_adam_options(args, options),
    }
    check_optimizer(name, options)
    why_no_rows = (
        "the trainer's clipping refuses those; leave optimizer_cls_and_kwargs away and, once the trainer is made, call "
        f"finetune.integrations.hugging_face.use_optimizer(trainer, {name!r})"
    )
    return BuildOptimizer, {"name": name, "why_no_rows": why_no_rows, **options}


def use_optimizer(trainer: Any, name: str, **options: Any) -> None:
    """Let `trainer`, before its `train()`, train with the optimizer called `name`, row-sparse gradients included.

    `options` as for `optimizer_factory`. Gradients are clipped by args.max_grad_norm over dense and row-sparse ones together.
    Raises UserError as optimizer_factory does, where the trainer has an optimizer already, and under DeepSpeed; as training starts,
    where FSDP, DataParallel or NCCL would come between the optimizer and its rows.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise UserError(
            "the trainer has an optimizer already; make it without optimizers and optimizer_cls_and_kwargs"
        )
    if trainer.is_deepspeed_enabled:
        raise UserError(
            f"DeepSpeed brings an optimizer of its own, which would replace {name}; choose it in DeepSpeed's config"
        )
    factory, settings = optimizer_factory(name, trainer.args, **options)
    whole = (
        trainer.accelerator.distributed_type.value in ("NO", "MULTI_CPU")
        and trainer.args.n_gpu <= 1
    )
    why_no_rows = (
        ""
        if whole
        else "that works in one process or over gloo, not with FSDP, DataParallel or NCCL; use adamw"
    )
    trainer.optimizer_cls_and_kwargs = (factory, {**settings, "why_no_rows": why_no_rows})
    clip_rows(trainer.accelerator)


def _changed_adam_options(args: Any, options: dict[str, Any]) -> dict[str, Any]:
    """betas and eps where `args` holds other values than its class does by default, and `options` does not set them."""
    default = {field.name: field.default for field in dataclasses.fields(args)}
    changed: dict[str, Any] = {}
    if (args.adam_beta1, args.adam_beta2) != (default["adam_beta1"], default["adam_beta2"]):
        changed["betas"] = (args.adam_beta1, args.adam_beta2)
    if args.adam_epsilon != default["adam_epsilon"]:
        changed["eps"] = args.adam_epsilon
    return {option: value for option, value in changed.items() if option not in options}
