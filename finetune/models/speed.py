"""What a model's speed is traded for: precision, activation checkpointing and torch.compile.

Precision. The weights stay in float32; only the matrix products may be narrower. bf16 pays only if
the chip multiplies it. A CPU without such instructions emulates it, 20 to 100 times slower than
float32.

Activation checkpointing needs less memory and more time. torch.compile makes steps faster and the
start slower.
"""

import contextlib
import logging
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import UserError
from finetune.models.language_model import LanguageModel

_logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16")


def resolve_precision(requested: str, device: torch.device | str) -> tuple[str, str]:
    """Return the precision ("fp32", "bf16" or "fp16") for `requested`, and one sentence of why.

    `requested` is one of the three, or "auto". Raises UserError for fp16 off CUDA. Logs a warning
    if bf16 is requested and would be emulated.
    """
    kind = torch.device(device).type
    native = has_native_bf16(kind)
    what = "this GPU" if kind == "cuda" else f"this {kind.upper()}"
    if requested == "auto":
        if native:
            return "bf16", f"bf16 matrix products, since {what} has bf16 instructions"
        return "fp32", f"fp32 matrix products, since {what} has no bf16 instructions"
    assert requested in PRECISIONS, requested
    if requested == "fp16" and kind != "cuda":
        raise UserError(
            f'training.precision is "fp16", which needs a CUDA device, not {what}. Use "auto", '
            '"fp32" or "bf16"'
        )
    if requested == "bf16" and not native:
        _logger.warning(
            'training.precision is "bf16", but %s has no bf16 instructions: expect it to be many '
            "times slower than fp32",
            what,
        )
    return requested, f"{requested} matrix products, as asked for"


def has_native_bf16(device_type: str) -> bool:
    """Return whether devices of this type multiply bf16 matrices in hardware on this machine.

    On a CPU that takes AVX512-BF16, AMX or Arm's BF16.
    """
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(bool(value) for name, value in found.items() if "bf16" in name)
    return False


def enable_activation_checkpointing(language_model: LanguageModel) -> None:
    """Keep only each layer's input for the backward and compute the rest again; in place.

    Costs one more forward a step (https://arxiv.org/abs/1604.06174). Raises UserError if the
    architecture cannot do it.
    """
    model = language_model.causal_lm
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"{error} Set training.activation_checkpointing: false") from error
    # Only the reentrant kind needs a gradient down to a frozen embedding.
    model.disable_input_require_grads()


def compile_decoder(language_model: LanguageModel) -> None:
    """Let torch.compile make kernels for the layers of the decoder, at its first forward; in place.

    No parameter is renamed. Layers of one kind share their kernels, so one is waited for instead of
    all (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html): once for training
    and once for evaluation. The loss is not compiled (LOG.md, "Liger's loss on a GPU").
    """
    decoder = language_model.causal_lm.base_model
    layers: list[nn.Module] = [
        part for part in decoder.modules() if isinstance(part, GradientCheckpointingLayer)
    ]
    # torch counts kernels over all layers, and some models have other kernels in each.
    limit = 8 * max(8, len(layers))
    torch._dynamo.config.cache_size_limit = max(limit, torch._dynamo.config.cache_size_limit)
    for part in layers or [decoder]:
        part.compile(dynamic=True)  # batches come in many lengths


def uncompiled(compiled: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a model that is `compiled` in training generates uncompiled.

    With a cache each layer would be compiled by itself.
    """
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
