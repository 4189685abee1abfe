"""The GGUF file of a model: metadata, tokenizer, and the weights in one of four formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH_NAMES
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.errors import UserError
from finetune.models.describe import token_tables
from finetune.models.llama_cpp.families import Family, family_of, is_transposed
from finetune.models.llama_cpp.tokens import add_tokens, read_words

Q8_BLOCK = 32  # values that share a scale; a row that is no multiple of it stays F16
IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".attention.bias")


@dataclass(frozen=True)
class GgufKind:
    """A format of the matrices. Vectors are always F32."""

    matrices: GGMLQuantizationType
    file_type: LlamaFileType


GGUF_KINDS = {
    "f32": GgufKind(GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": GgufKind(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": GgufKind(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": GgufKind(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def check_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the model or its tokenizer cannot be written."""
    family_of(model.config)
    read_words(tokenizer)


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    kind: str,
    *,
    name: str,
    license: str | None = None,
) -> None:
    """Write the file at `path`. `kind` is a key of GGUF_KINDS; `name` and `license` are metadata.

    Raises UserError if the model or its tokenizer is not of a family that llama.cpp runs.
    """
    family = family_of(model.config)
    writer = GGUFWriter(str(path), MODEL_ARCH_NAMES[family.arch])
    writer.add_type("model")
    writer.add_name(name)
    if license is not None:
        writer.add_license(license)
    family.sizes(writer, model.config)
    writer.add_file_type(GGUF_KINDS[kind].file_type)
    writer.add_quantization_version(2)
    add_tokens(writer, tokenizer, len(token_tables(model)[0]))
    for tensor_name, weight in weights_of(model, family).items():
        values, how = encoded(weight, GGUF_KINDS[kind].matrices)
        writer.add_tensor(tensor_name, values, raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_of(model: PreTrainedModel, family: Family) -> Mapping[str, Tensor]:
    """Return the weights by llama.cpp's names, in its order.

    A head that is tied is left out, if the family can do without.
    """
    names = get_tensor_name_map(family.arch, model.config.num_hidden_layers)
    table, head = token_tables(model)
    is_left_out = head is table and not family.needs_head
    found: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.endswith(IGNORED) or (is_left_out and name.startswith(("lm_head", "embed_out"))):
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UserError(f"llama.cpp has no name for the weight {name}. Leave out --gguf")
        found[known] = family.weight(name, weight.detach().float().cpu(), model.config)
    return found


def encoded(
    weight: Tensor, matrices: GGMLQuantizationType
) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Return the values of a tensor as the file has them, and their format."""
    how = matrices
    if weight.ndim < 2:
        how = GGMLQuantizationType.F32
    elif how == GGMLQuantizationType.Q8_0 and weight.shape[-1] % Q8_BLOCK:
        how = GGMLQuantizationType.F16
    return quants.quantize(np.ascontiguousarray(weight.numpy()), how), how


@torch.no_grad()
def rounded(model: PreTrainedModel, kind: str) -> Mapping[str, Tensor]:
    """Return the model's weights as they come back from a file of that kind, by their names."""
    found: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if weight.is_floating_point():
            turned = is_transposed(name, model.config)  # blocks lie along the rows of the file
            there = (weight.T if turned else weight).detach().float().cpu()
            values, how = encoded(there, GGUF_KINDS[kind].matrices)
            back = torch.from_numpy(quants.dequantize(values, how)).reshape(there.shape)
            found[name] = back.T if turned else back
    return found
