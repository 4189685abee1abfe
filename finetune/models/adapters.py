"""LoRA through peft (https://arxiv.org/abs/2106.09685).

The rows of added tokens know nothing yet, and a frozen table would leave them so. They alone are
also trained, through peft's trainable token indices, which keep a tied head tied.
(`modules_to_save` would train the whole table. It unties the table silently, and the merged model
is then wrong after reloading.)
"""

import copy
import warnings
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.errors import UserError
from finetune.models.describe import token_tables
from finetune.models.vocabulary.rows import ActiveHead


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: str | Sequence[str],
    new_token_ids: Sequence[int] = (),
) -> PeftModel:
    """Freeze the model and add trainable low-rank adapters to `target_modules`.

    Changes `model` in place and wraps it. `target_modules`: ends of module names, or "all-linear"
    (every linear layer but the head). `new_token_ids`: rows of the token table (and of an untied
    head) that are trained too. Raises UserError if no module has such a name, or if the module is
    an output head with active rows.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    every = targets == ["all-linear"]
    for target in [] if every else targets:
        chosen = [
            module
            for name, module in linear.items()
            if name == target or name.endswith("." + target)
        ]
        if any(isinstance(module, ActiveHead) for module in chosen):
            raise UserError(
                f"model.lora.target_modules: {target!r} is the output head, and an active "
                "vocabulary trains rows of it. Leave it out, or set vocabulary.mode to full"
            )
        if not chosen:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"model.lora.target_modules: {target!r} is not a linear layer of this model. Give "
                f'"all-linear", or some of {ends}'
            )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft declares int and takes a float
        lora_dropout=dropout,
        target_modules="all-linear" if every else targets,
        trainable_token_indices=_rows(model, new_token_ids),
        # GPT-2 stores its weights transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 a question by its old name
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Return a copy of the model with its adapters and new rows added into its weights.

    `model` itself stays as it is.
    """
    return copy.deepcopy(model).merge_and_unload()


def _rows(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]] | None:
    if not ids:
        return None
    table, head = token_tables(model)
    if head is not table and getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            "LoRA with added tokens drops the bias of this model's head (a limit of peft). Train "
            "without model.lora"
        )
    modules = [model.get_input_embeddings()] + (
        [] if head is None or head is table else [model.get_output_embeddings()]
    )
    return {
        name: list(ids)
        for name, module in model.named_modules()
        if any(module is wanted for wanted in modules)
    }
