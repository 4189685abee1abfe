"""Attention over packed rows at the price of the examples alone.

Floor 2. On a CPU torch's fused kernel visits every pair of positions in a row, also those that the mask forbids: in rows of 512
tokens that hold examples of 75, six parts in seven of its work are thrown away. Here each example's square on the diagonal of the
mask goes to the kernel by itself. The mask still says who sees whom, so windows and all else that an architecture puts there hold.

SmolLM2's attention over 4 x 512 tokens in examples of 73, forward and backward, one AVX2 thread: 177 ms a layer, and so 51 ms.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_EXAMPLE = "sdpa_by_example"
CALL_COST = 500_000
"""What one more call of the kernel costs, in products of two numbers that it could make in that time (about 0.1 ms)."""


def attend_by_example(model: PreTrainedModel) -> None:
    """Let a model that uses sdpa attend as said above wherever its rows are packed; in place. Results stay the same."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(BY_EXAMPLE)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [rows, heads, length, d], key and value [rows, fewer heads, length, d] to [rows, length, heads, d]."""
    lengths = _example_lengths(query, key, attention_mask, options)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None
    rows, heads, length, _ = query.shape
    # The rows end to end, so that one split cuts them all, whose backward is one concatenation.
    pieces = [_end_to_end(repeat_kv(t, heads // t.shape[1])).split(lengths, 2) for t in (query, key, value)]
    outputs, start = [], 0
    masks = attention_mask.expand(rows, -1, -1, -1)
    for q, k, v in zip(*pieces, strict=True):
        row, first = divmod(start, length)
        own = slice(first, first + q.shape[2])
        mask = masks[row : row + 1, :, own, own]  # of four dimensions: with three, torch leaves the fused kernel
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=options.get("dropout", 0.0), scale=options.get("scaling")
        )
        outputs.append(output.transpose(1, 2))
        start += q.shape[2]
    return torch.cat(outputs, 1).view(rows, length, heads, -1), None


def _example_lengths(query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> list[int] | None:
    """How many tokens each example of the batch has, row after row; None where one call for all is right or cheaper."""
    positions = options.get("position_ids")
    rows, heads, length, width = query.shape
    if (
        attention_mask is None
        or positions is None
        or positions.shape != (rows, length)
        or attention_mask.shape[-2:] != (length, length)
        or key.shape[2] != length
        or options.get("position_bias") is not None
        or query.device.type != "cpu"
        or torch.compiler.is_compiling()
    ):
        return None
    first = positions == 0
    first[:, 0] = True
    starts = first.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([rows * length]))
    spared = rows * length**2 - int((lengths**2).sum())
    return lengths.tolist() if spared * heads * width > CALL_COST * len(lengths) else None


def _end_to_end(tensor: Tensor) -> Tensor:
    """[rows, heads, length, d] to [1, heads, rows * length, d]."""
    rows, heads, length, width = tensor.shape
    return tensor.transpose(1, 2).reshape(1, rows * length, heads, width).transpose(1, 2)


AttentionInterface.register(BY_EXAMPLE, _forward)
AttentionMaskInterface.register(BY_EXAMPLE, sdpa_mask)
