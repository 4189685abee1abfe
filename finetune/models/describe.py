"""What a model is: its shape and size in numbers, its tables, and what this project uses of it."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class CausalLM(Protocol):
    """What this project uses of a causal language model of transformers, in peft's wrapper or
    not.
    """

    config: Any
    generation_config: Any

    @property
    def device(self) -> torch.device: ...
    def get_input_embeddings(self) -> nn.Module: ...
    def get_output_embeddings(self) -> nn.Module | None: ...
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


CACHE_NAMES = ("cache", "past_key_values")
"""What a forward calls the cache that it takes: the first since transformers 5.24."""

_CONTEXT = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""The keys of a config for its number of positions: most models', MPT's, Whisper's."""


COUNTS_FROM_PADDING = "create_position_ids_from_input_ids"
"""A method of RoBERTa and its kin, whose first position is the one behind the padding's."""


def describe_model(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Return counts of parameters (shared ones once) and the shape of the model.

    Works on the meta device too. `trainable_parameters` includes the spare rows and the shift of an
    active vocabulary (`finetune.models.vocabulary`). `parameters`, those of the model, does not.
    """
    inner = inner_model(model)
    config = inner.config.get_text_config()
    parameters = list(model.parameters())  # a shared one comes once
    table, head = token_tables(inner)
    tied = head is table
    rows = _rows(inner.get_input_embeddings())
    in_tables = rows * table.shape[1] + (
        0 if tied or head is None else _rows(inner.get_output_embeddings()) * head.shape[1]
    )
    total = sum(parameter.numel() for parameter in parameters) - _extra_parameters(inner)
    return {
        "architecture": type(inner).__name__,
        "parameters": total,
        "trainable_parameters": sum(
            parameter.numel() for parameter in parameters if parameter.requires_grad
        ),
        "token_table_parameters": in_tables,
        "token_table_share": in_tables / total,
        "tied": tied,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": rows,
        "lora": isinstance(model, PeftModel),
    }


def inner_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model of transformers, inside peft's wrapper if there is one."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def taken(model: CausalLM, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `options` that the forward of `model` takes, the cache by one name."""
    forward: Any = inner_model(cast(Any, model)).forward
    parameters = inspect.signature(forward).parameters
    names = set(parameters)
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        outputs = {field.name for field in fields(CausalLMOutputWithPast)}
        usual = next(name for name in CACHE_NAMES if name in outputs)
        known = names & {*CACHE_NAMES} or {usual}
        names |= {*options} - {*CACHE_NAMES} | known
    return {name: value for name, value in options.items() if name in names}


def cache_of(output: Any) -> Any:
    """Return the cache that a forward has returned."""
    caches = (getattr(output, name, None) for name in CACHE_NAMES)
    return next((cache for cache in caches if cache is not None), None)


def context_length(model: CausalLM) -> int | None:
    """Return how many tokens a causal language model reads at once; None if it has no limit."""
    config = model.config.get_text_config()
    found = next((getattr(config, key) for key in _CONTEXT if hasattr(config, key)), None)
    if not isinstance(found, int) or found <= 0:  # XLNet's is -1
        return None
    counting = [part for part in model.modules() if hasattr(part, COUNTS_FROM_PADDING)]
    first = [getattr(part, "padding_idx", None) for part in counting]
    return found - max([pad + 1 for pad in first if isinstance(pad, int)], default=0)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct tensors."""
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in {id(tensor): tensor for tensor in tensors}.values()
    )


def token_tables(model: CausalLM) -> tuple[Tensor, Tensor | None]:
    """Return the weights [V, d] of the input embedding and of the output head, if there is one.

    They are taken from behind any wrapper of peft.
    """
    table = _weight(model.get_input_embeddings())
    assert table is not None
    return table, _weight(model.get_output_embeddings())


def _extra_parameters(model: PreTrainedModel) -> int:
    """Return the parameters of active vocabularies outside of the full table: spare rows, shift."""
    modules: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    compact = {
        id(module.vocabulary): module for module in modules if hasattr(module, "vocabulary")
    }  # a tied one once
    count = 0
    for module in compact.values():
        weight: Any = _weight(module)
        count += (
            weight.numel()
            + sum(part.numel() for part in module.vocabulary.parameters())
            - _rows(module) * weight.shape[1]
        )
    return count


def _rows(module: Any) -> int:
    """Return the number of rows of a table, frozen rows of an active vocabulary included."""
    vocabulary = getattr(module, "vocabulary", None)
    weight = _weight(module)
    assert weight is not None
    return weight.shape[0] if vocabulary is None else len(vocabulary.row_of_id)


def _weight(module: nn.Module | None) -> Tensor | None:
    inner: Any = getattr(module, "original_module", None) or module
    return None if inner is None else inner.weight
