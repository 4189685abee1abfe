"""What a model is, in numbers: for the plan, the report and the environment. Floor 2."""

from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


def describe_model(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Counts of parameters (shared ones once) and the shape of the model, which works on the meta device too.

    `trainable_parameters` has the spare rows and the shift of an active vocabulary (`finetune.models.vocabulary`); `parameters`,
    which are the model's, has not.
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
    total = sum(parameter.numel() for parameter in parameters) - _beside_rows(inner)
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
    """The model of transformers, inside peft's wrapper where there is one."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def token_tables(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The weights [V, d] of the input embedding and of the output head (None where there is none), behind any wrapper of peft."""
    table = _weight(model.get_input_embeddings())
    assert table is not None
    return table, _weight(model.get_output_embeddings())


def _beside_rows(model: PreTrainedModel) -> int:
    """Parameters of active vocabularies that are no row of the full table: spare rows and the shift."""
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
    """Rows of a table, those of an active vocabulary that do not train included."""
    vocabulary = getattr(module, "vocabulary", None)
    weight = _weight(module)
    assert weight is not None
    return weight.shape[0] if vocabulary is None else len(vocabulary.row_of_id)


def _weight(module: nn.Module | None) -> Tensor | None:
    inner: Any = getattr(module, "original_module", None) or module
    return None if inner is None else inner.weight
