"""The arithmetic of `finetune.compute`, put into a model of transformers in place.

`fuse` changes how attention, norms and gated MLPs are computed; parameters and results stay the
same, up to rounding. `output_head` reads from a model what the loss needs, so that the loss can
take the place of the model's own product with its head. `tree_masks` makes the masks of examples
that share their beginnings (`finetune.data.batches.trees`).
"""

import inspect
import re
import sys
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune.compute.attention import attend, is_fused
from finetune.compute.gates import fuse_gates
from finetune.compute.layout import Layout, max_together, plan_layout, plan_tree_layout
from finetune.compute.loss import FrozenRows
from finetune.compute.norms import fuse_norms
from finetune.compute.rotary import keep_texts_apart
from finetune.models.vocabulary.rows import ActiveHead

BY_EXAMPLE = "sdpa_by_example"
"""The name of our attention among transformers' implementations."""


def fuse(model: PreTrainedModel) -> None:
    """Let attention, RMS norms and gated MLPs of `model` compute as `finetune.compute` does.

    A part that is not understood, or not faster this way on its device, computes as before.
    """
    if model.config._attn_implementation == "sdpa" and not _asks_for_the_name(model):
        model.set_attn_implementation(BY_EXAMPLE)
    fuse_norms(model)
    fuse_gates(model)
    keep_texts_apart(model)


def _asks_for_the_name(model: PreTrainedModel) -> bool:
    """Return whether the code of `model` does something else for attention of another name.

    DeepSeek-V3.2 and its kind put the keys that their indexer chose into the mask for two names
    only.
    """
    asks = re.compile(r'_attn_implementation (in \(|== )[^\n]*"sdpa"(?!.*trf-ignore)')
    own = [each for each in type(model).__mro__ if issubclass(each, PreTrainedModel)]
    modules = {each.__module__ for each in own if each is not PreTrainedModel}
    return any(asks.search(_source(sys.modules[name])) for name in modules & {*sys.modules})


def _source(module: Any) -> str:
    """Return the code of a module; "" of a notebook's."""
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""


class OutputHead(NamedTuple):
    """What turns hidden states into logits (see `finetune.compute.loss.causal_lm_loss`)."""

    weight: Tensor  # [V, d], or [A, d]: the rows that train
    bias: Tensor | None  # [V]
    frozen: FrozenRows | None  # the other rows of an active vocabulary
    softcap: float | None
    logit_scale: float


def output_head(model: PreTrainedModel) -> OutputHead:
    """Return the output head of `model` as it is now; soft cap and scale as its config has them."""
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    weight, frozen = head.weight, None
    if isinstance(head, ActiveHead):
        weight, frozen = head.rows, head.vocabulary.frozen_rows()
    scale = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    softcap = softcap or getattr(config, "logits_soft_cap", None)  # RecurrentGemma
    return OutputHead(
        weight,
        getattr(head, "bias", None),
        frozen,
        softcap,
        scale or 1 / (divisor or 1.0),
    )


def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether `model` has a head without LoRA, and a decoder apart from that head."""
    head = model.get_output_embeddings()
    return (
        head is not None and not isinstance(head, BaseTunerLayer) and model.base_model is not model
    )


def tree_masks(model: PreTrainedModel, position_ids: Tensor, reach: Tensor) -> Any:
    """Return what `model` takes as the attention mask of trees: a mask, or one for each kind.

    transformers makes masks from places in a sequence, and cuts a sequence wherever positions jump.
    In a tree both are wrong. A mask with four dimensions is used as it is, so each kind of layer
    gets one: a token sees those of its path, in sliding windows by position.

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
        seen &= position_ids[:, :, None] < (position_ids + window)[:, None, :]
    mask = seen[:, None]
    if as_numbers:
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)
    mask._tree = (reach, position_ids, window)  # type: ignore[attr-defined]
    return mask


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks its implementations to.

    query [sequences, heads, length, d] and key and value [sequences, fewer heads, length, d] give
    [sequences, length, heads, d].
    """
    layout = None
    if (
        query.device.type == "cpu"
        and key.shape[2] == query.shape[2] > 1
        and not torch.compiler.is_compiling()
    ):
        layout = _layout_of(module, query, attention_mask, options)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale, dropout = options.get("scaling"), options.get("dropout", 0.0)
    return attend(query, key, value, layout, scale=scale, dropout=dropout), None


def _layout_of(
    module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Layout | None:
    """Return how the micro-batch is taken apart; None if its mask is not understood."""
    if options.get("position_bias") is not None or not getattr(module, "is_causal", True):
        return None
    sequences, heads, length, _ = query.shape
    few_shapes = not is_fused(query)
    # A mask without data (in a rehearsal) may have any layout: what is kept is the same.
    if mask is None or isinstance(mask, FakeTensor):
        if options.get("is_causal") is False:
            return None
        if isinstance(query, FakeTensor) and not options.get("dropout"):
            # the first group is the largest, and the others take much the same room after it
            sequences = min(sequences, max_together(length, heads, few_shapes=few_shapes))
        return plan_layout([length] * sequences, heads, few_shapes=few_shapes)
    if not hasattr(mask, "_layout"):  # kept with the mask, for all layers
        positions = options.get("position_ids")
        mask._layout = (  # type: ignore[attr-defined]
            _tree_layout(mask._tree, heads, few_shapes)
            if hasattr(mask, "_tree")
            else _read_layout(mask, positions, query, few_shapes)
        )
    return mask._layout  # type: ignore[attr-defined]


def _tree_layout(tree: tuple[Tensor, Tensor, int | None], heads: int, few_shapes: bool) -> Layout:
    """Return the layout of the trees that a mask was made of (see `tree_masks`)."""
    reach, positions, window = tree
    begins = torch.arange(len(reach))[:, None] * reach.shape[1]  # places go on from row to row
    ends = (reach + begins).flatten().tolist()
    places = positions.flatten().tolist()
    return plan_tree_layout(ends, places, heads, window=window, few_shapes=few_shapes)


def _read_layout(
    mask: Tensor, positions: Tensor | None, query: Tensor, few_shapes: bool
) -> Layout | None:
    """Return the layout that a mask and the positions describe.

    mask [sequences or 1, 1, length, length] bool, positions [sequences or 1, length], query
    [sequences, heads, length, d]. None unless the mask is that of examples one after the other in
    their sequences, all of one causal pattern.
    """
    sequences, heads, length, _ = query.shape
    if (
        positions is None
        or mask.dtype != torch.bool
        or mask.shape[1:] != (1, length, length)
        or positions.shape[1] != length
    ):
        return None
    first = positions.expand(sequences, length) == 0
    first[:, 0] = True
    starts = first.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([sequences * length])).tolist()
    corners = [
        mask[min(start // length, len(mask) - 1), 0, start % length :, start % length :]
        for start in starts.tolist()
    ]
    squares = [corner[:n, :n] for corner, n in zip(corners, lengths, strict=True)]
    seen = max(squares, key=len)
    alike = all(torch.equal(square, seen[: len(square), : len(square)]) for square in squares)
    causal = bool(seen.diagonal().all()) and not seen.triu(1).any()
    if not (alike and causal):
        return None
    sees_all = 2 * int(seen.sum()) == len(seen) * (len(seen) + 1)
    window = None if sees_all else seen
    return plan_layout(lengths, heads, window=window, few_shapes=few_shapes)


AttentionInterface.register(BY_EXAMPLE, _forward)
AttentionMaskInterface.register(BY_EXAMPLE, sdpa_mask)
