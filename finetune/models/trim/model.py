"""The smaller tables: the rows of the kept tokens, bit for bit, and new ids in the configs."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from finetune.errors import UserError
from finetune.models.describe import context_length, token_tables
from finetune.models.trim.renumber import renumbered


@torch.no_grad()
def trim_model(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Return a copy of `model` whose row n is that of the token `kept[n]`, in evaluation mode.

    The head's bias is cut too. Raises UserError if the model has other tables of tokens.
    """
    table, head = token_tables(model)
    _check_other_tables(model)
    smaller = copy.deepcopy(model)
    rows = torch.tensor(kept, device=table.device)
    tables = [smaller.get_input_embeddings(), smaller.get_output_embeddings()]
    for module in tables:
        if module is not None:
            for name, parameter in [*module.named_parameters(recurse=False)]:
                cut = nn.Parameter(parameter[rows], requires_grad=parameter.requires_grad)
                setattr(module, name, cut)
    if head is table:
        tables[1].weight = tables[0].weight
    for module in tables:
        for size in ("num_embeddings", "out_features"):
            if hasattr(module, size):
                setattr(module, size, len(kept))
    if (padding := getattr(tables[0], "padding_idx", None)) is not None:
        tables[0].padding_idx = {old: new for new, old in enumerate(kept)}.get(padding)
    new_ids = {old: new for new, old in enumerate(kept)}
    _renumber(smaller.config, new_ids)
    smaller.config.get_text_config().vocab_size = len(kept)
    _renumber(smaller.generation_config, new_ids)
    smaller.generation_config._from_model_config = False
    return smaller.eval()


def _renumber(config: PretrainedConfig | GenerationConfig, new_ids: Mapping[int, int]) -> None:
    for key, value in [*vars(config).items()]:
        if isinstance(value, PretrainedConfig):
            _renumber(value, new_ids)
        else:
            setattr(config, key, renumbered(key, value, new_ids))


def _check_other_tables(model: PreTrainedModel) -> None:
    """Raise UserError if another embedding than the input's has a row for each token (Gemma 3n)."""
    table = model.get_input_embeddings()
    rows = len(token_tables(model)[0])
    for name, module in model.named_modules():
        size = module.num_embeddings if isinstance(module, nn.Embedding) else None
        if module is not table and size == rows != context_length(model):
            raise UserError(
                f"{name} also has a row for each of the {size:,} tokens, and it is not known how "
                "to trim it. Export without --trim"
            )
