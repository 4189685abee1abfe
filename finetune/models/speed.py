"""Memory against time, and time against a wait at the start: activation checkpointing and torch.compile.

Floor 2.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import UserError
from finetune.models.language_model import LanguageModel


def enable_activation_checkpointing(language_model: LanguageModel) -> None:
    """Keep only the input of each layer for the backward and compute the rest again (https://arxiv.org/abs/1604.06174); in place.

    Costs one more forward a step. Raises UserError where the architecture cannot.
    """
    model = language_model.causal_lm
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"{error} Set training.activation_checkpointing: false") from error
    model.disable_input_require_grads()  # only the reentrant kind needs a gradient down to a frozen embedding


def compile_decoder(language_model: LanguageModel) -> None:
    """Let torch.compile make kernels for the layers of the decoder, at its first forward; in place, and no parameter is renamed.

    Layers of one kind share them, so that one is waited for instead of all
    (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html), once for training and once for evaluation. The loss
    stays as it is (LOG.md, "Liger's loss on a GPU", has what compiling it would bring).
    """
    decoder = language_model.causal_lm.base_model
    layers: list[nn.Module] = [
        part for part in decoder.modules() if isinstance(part, GradientCheckpointingLayer)
    ]
    limit = 8 * max(
        8, len(layers)
    )  # torch counts kernels over all layers, and some models have others in each
    torch._dynamo.config.cache_size_limit = max(limit, torch._dynamo.config.cache_size_limit)
    for part in layers or [decoder]:
        part.compile(dynamic=True)  # batches come in many lengths


def uncompiled(compiled: bool) -> contextlib.AbstractContextManager[Any]:
    """For generating from a model that is `compiled` in training: with a cache each layer would be compiled by itself."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
