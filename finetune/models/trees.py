"""Trees of examples (`finetune.data.batches.trees`) in a model of transformers: masks and limits.

transformers makes masks from places in a sequence, and cuts a sequence wherever positions jump. In
a tree both are wrong. A mask with four dimensions is used as it is, so each kind of layer gets one:
a token sees those of its path, in sliding windows by position.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.models.describe import CausalLM, inner_model

LAYER_KINDS = ("full_attention", "sliding_attention")
"""The kinds of layers, as configs name them, for which there are masks of trees."""

COUNTS_PLACES = {
    "bloom": "its ALiBi counts places instead of positions",
    "mpt": "its ALiBi counts places instead of positions",
    "gpt_neo": "its local layers count places instead of positions",
}
STATEFUL = "its layers carry a state along the sequence"


def tree_masks(model: PreTrainedModel, position_ids: Tensor, reach: Tensor) -> Any:
    """Return what `model` takes as the attention mask of trees: a mask, or one for each kind.

    position_ids and reach [sequences, length], as in `finetune.data.types.MicroBatch`. A mask is
    [sequences, 1, length, length]: bool, or numbers to add for eager attention. It keeps the tree
    that it was made of as `_tree`.
    """
    config = model.config.get_text_config()
    as_numbers = model.config._attn_implementation == "eager"
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return _mask(position_ids, reach, window, as_numbers)
    windows = {"sliding_attention": window}
    return {kind: _mask(position_ids, reach, windows.get(kind), as_numbers) for kind in kinds}


def _mask(position_ids: Tensor, reach: Tensor, window: int | None, as_numbers: bool) -> Tensor:
    places = torch.arange(reach.shape[1], device=reach.device)
    seen = (places <= places[:, None]) & (places[:, None] < reach[:, None, :])
    if window is not None:
        seen &= position_ids[:, :, None] - position_ids[:, None, :] < window
    mask = seen[:, None]
    if as_numbers:
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)
    mask._tree = (reach, position_ids, window)  # type: ignore[attr-defined]
    return mask


def tree_obstacle(model: CausalLM, *, max_length: int) -> str | None:
    """Return why examples of at most `max_length` tokens cannot share beginnings; None: they can.

    The reason is the end of a sentence about the model.
    """
    return next(_obstacles(model, inner_model(model), max_length), None)


def _obstacles(model: nn.Module, inner: PreTrainedModel, max_length: int) -> Iterator[str]:
    config: Any = inner.config.get_text_config()
    if inner.config._attn_implementation == "flash_attention_2":
        yield "flash_attention_2 takes no mask. Set model.attn_implementation: sdpa"
    if config.model_type in COUNTS_PLACES:
        yield COUNTS_PLACES[config.model_type]
    if getattr(config, "alibi", False):
        yield COUNTS_PLACES["bloom"]
    kinds = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in kinds or getattr(config, "attention_chunk_size", None):
        yield "its chunked attention counts places instead of positions"
    if getattr(inner, "_is_stateful", False) or kinds - set(LAYER_KINDS):
        yield STATEFUL
    if (limit := _rotary_limit(config)) is not None and max_length > limit:
        yield f"beyond {limit} tokens its rotary scaling depends on the longest example of a batch"
    if _drops(model):
        yield "its dropout would be drawn once for all examples that share a beginning"
    if any(value for key, value in config.to_dict().items() if key.endswith("jitter_noise")):
        yield "its noise would be drawn once for all examples that share a beginning"


def _rotary_limit(config: Any) -> int | None:
    """Return from how many tokens on the rotary scaling depends on the batch; None: it never does.

    The parameters are those of all layers, or of each kind.
    """
    given = getattr(config, "rope_parameters", None) or {}
    for rope in [given, *(part for part in given.values() if isinstance(part, dict))]:
        kind = rope.get("rope_type") or ""
        if "dynamic" in kind or kind == "longrope":
            return rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return None


def _drops(model: nn.Module) -> bool:
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return True
        for name in ("attention_dropout", "dropout"):
            if isinstance(share := getattr(module, name, None), float) and share > 0:
                return True
    return False
