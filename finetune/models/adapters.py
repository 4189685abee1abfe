"""LoRA through peft (https://arxiv.org/abs/2106.09685).

The rows of added tokens know nothing yet, and a frozen table would leave them so. They alone are
also trained, through peft's trainable token indices, which keep a tied head tied.
(`modules_to_save` would train the whole table. It unties the table silently, and the merged model
is then wrong after reloading.)
"""

import copy
import logging
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from finetune.errors import Border, UserError, reason_of
from finetune.models.describe import inner_model, token_tables
from finetune.models.locate import MODEL_PACKAGE
from finetune.models.vocabulary.rows import ActiveHead

_logger = logging.getLogger(__name__)

ADAPTERS = "adapters"  # the folder in an exported model that has LoRA's adapters by themselves

_README = """\
LoRA adapters, which are merged in the folder above. Here they load onto their base model:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
base.resize_token_embeddings({rows})  # rows for added tokens
model = PeftModel.from_pretrained(base, "adapters")  # this folder
```
"""


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
    head) that are trained too. Logs a warning if a mixture of experts keeps its experts as they
    are. Raises UserError if no module has such a name, or if the module is an output head with
    active or new rows, or with the table of the input.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    every = targets == ["all-linear"]
    if not every:
        _check_targets(model, linear, targets, new_rows=bool(new_token_ids))
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft declares int and takes a float
        lora_dropout=dropout,
        target_modules=_every_layer(model, linear) if every else targets,
        trainable_token_indices=_rows(model, new_token_ids),
        # GPT-2 stores its weights transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    do = "Leave out model.lora, lower its rank, or name other model.lora.target_modules"
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by an old name
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )
        # peft has settings for experts that it does not adapt here.
        warnings.filterwarnings("ignore", r"The following \w+_pattern keys", RuntimeWarning)
        with Border(f"LoRA cannot adapt {type(model).__name__}", do=do, reason=_reason):
            wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    if count := _expert_weights(model):
        _logger.warning(
            "LoRA adapts linear layers: the %s weights of the experts, which are not, get no "
            "adapters and stay as they are",
            f"{count:,}",
        )
    return wrapped


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Return a copy of the model with its adapters and new rows added into its weights.

    `model` itself stays as it is.
    """
    return copy.deepcopy(model).merge_and_unload()


def _reason(error: BaseException) -> str:
    """Return what an error of peft says first, without the mark in brackets, or torch's reason."""
    if not isinstance(error, ValueError):  # memory that cannot be had
        return reason_of(error)
    return re.sub(r"^(\[[^]]*\] ?)+", "", str(error).splitlines()[0]).split(". ")[0].rstrip(".")


def base_of_adapters(model: PeftModel) -> str:
    """Return the name of the model that the adapters belong to; "" if they alone are not enough.

    They are not if the base has random weights, or if rows of an active vocabulary train too. Nor
    are they if the base is a .gguf file: peft loads them onto a folder.
    """
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name and "trainable_tokens" not in name
    ]
    name = str(getattr(model.get_base_model(), "name_or_path", "") or "")
    is_gguf = name.endswith(".gguf") or name.startswith(MODEL_PACKAGE)
    return "" if others or is_gguf else name


def save_adapters(
    model: PeftModel, base: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write adapter_model.safetensors and its config, which peft loads onto the model `base`.

    The tokenizer is written too: the base may need rows for tokens that were added. A README shows
    how to add them.
    """
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    rows = len(token_tables(inner_model(model))[0])
    (folder / "README.md").write_text(_README.format(base=base, rows=rows), encoding="utf-8")


def _check_targets(
    model: PreTrainedModel, linear: Mapping[str, Any], targets: Sequence[str], *, new_rows: bool
) -> None:
    """Raise UserError for a target that is no linear layer, or that cannot be adapted alone."""
    shared = _shared_weights(model)
    for target in targets:
        chosen = [
            module
            for name, module in linear.items()
            if name == target or name.endswith("." + target)
        ]
        is_head = any(module is model.get_output_embeddings() for module in chosen)
        if any(isinstance(module, ActiveHead) for module in chosen):
            raise UserError(
                f"model.lora.target_modules: {target!r} is the output head, and an active "
                "vocabulary trains rows of it. Leave it out, or set vocabulary.mode to full"
            )
        if any(id(module.weight) in shared for module in chosen):
            others = "the input embedding" if is_head else "other layers"
            raise UserError(
                f"model.lora.target_modules: {target!r} shares its weights with {others}, and what "
                "one learns would be merged into both. Leave it out"
            )
        if is_head and new_rows:  # peft cannot do both
            raise UserError(
                f"model.lora.target_modules: {target!r} is the output head, and the rows of added "
                "tokens train in it. Leave it out"
            )
        if not all(map(_is_product, chosen)):
            raise UserError(
                f"model.lora.target_modules: {target!r} computes more than a product, which "
                "adapters cannot follow. Leave it out"
            )
        if not chosen:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"model.lora.target_modules: {target!r} is not a linear layer of this model. Give "
                f'"all-linear", or some of {ends}'
            )


def _every_layer(model: PreTrainedModel, linear: Mapping[str, nn.Module]) -> str | list[str]:
    """Return what peft takes for every linear layer but the head.

    Left out are layers that share their weight, as Zamba's do: an adapter on one of them would be
    merged into all. So are subclasses that return more than a product, as the routers of Phi-MoE.
    """
    shared, head = _shared_weights(model), model.get_output_embeddings()
    chosen = [
        name
        for name, module in linear.items()
        if module is not head and id(module.weight) not in shared and _is_product(module)
    ]
    others = sum(module is not head for module in linear.values()) - len(chosen)
    if not others:
        return "all-linear"
    _logger.warning(
        "%d linear layers get no adapters: they share their weights, or compute something else",
        others,
    )
    return chosen


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of the weights that several modules use."""
    used = Counter(
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    )
    again = Counter(
        id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)
    )
    return {key for key in used if used[key] > 1 or again[key] > 1}


def _is_product(module: Any) -> bool:
    if isinstance(module, Conv1D) or type(module) is nn.Linear:
        return True
    weight = module.weight
    try:
        out = module(torch.zeros(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device))
    except Exception:  # it takes something else
        return False
    return isinstance(out, torch.Tensor) and out.shape == (1, 2, weight.shape[0])


def _expert_weights(model: PreTrainedModel) -> int:
    """Return the parameters of experts, which are kept in one matrix for each expert."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name and "lora_" not in name
    )


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
