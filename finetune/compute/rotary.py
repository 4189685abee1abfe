"""Rotary embeddings that depend on the length of a text, computed for each text by itself.

LongRoPE (https://arxiv.org/abs/2402.13753) has one scaling for texts up to an original length and
another for longer ones. transformers decides by the largest position of a batch, so that a short
text would be read in another way beside a long one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from finetune.compute.subclass import put_before

LONGROPE = "longrope"
"""The kind of scaling that another one follows beyond the original length."""


def switching_length(config: Any) -> int | None:
    """Return up to how many tokens a text has its first scaling; None if there is only one.

    config: of a text model of transformers. Its parameters are those of all layers, or of each
    kind. The scaling `dynamic` begins beyond the model's number of positions, where no text goes.
    """
    given = getattr(config, "rope_parameters", None) or {}
    lengths = [_length(rope) for rope in (given, *given.values()) if isinstance(rope, dict)]
    return min((length for length in lengths if length is not None), default=None)


def _length(rope: dict[str, Any]) -> int | None:
    return (
        rope.get("original_max_position_embeddings") if rope.get("rope_type") == LONGROPE else None
    )


def keep_texts_apart(model: nn.Module) -> None:
    """Let the rotary embeddings of `model` scale each text by its own length, in place."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if LONGROPE in kinds and not isinstance(module, RotaryByText):
            put_before(module, RotaryByText)


class RotaryByText(nn.Module):
    """The class that is put before the class of a rotary embedding that switches."""

    config: Any

    @torch.compiler.disable
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Return what the embedding gives each text of position_ids [sequences, length] alone.

        A text begins at each position of 0; padding may repeat a position.
        """
        parameters = self.config.rope_parameters
        length = _length(parameters if layer_type is None else parameters[layer_type])
        kind = {} if layer_type is None else {"layer_type": layer_type}
        far = super().forward(x, position_ids, **kind)
        if length is None or isinstance(position_ids, FakeTensor):
            return far
        long = reaches(position_ids, length)
        if not long.any() or long.all():
            return far
        near = super().forward(x, position_ids.clamp(max=length - 1), **kind)
        return tuple(torch.where(long[..., None], *both) for both in zip(far, near, strict=True))


def reaches(position_ids: Tensor, length: int) -> Tensor:
    """Return which places of [sequences, length] are of a text longer than `length` tokens."""
    begins = position_ids == 0
    begins[:, 0] = True
    text = begins.flatten().cumsum(0) - 1
    longest = torch.zeros_like(text).scatter_reduce(0, text, position_ids.flatten(), "amax")
    return (longest[text] >= length).view_as(position_ids)


def padded_positions(ends: Tensor, length: int) -> Tensor:
    """Return positions [sequences, length] of texts that end at `ends` [sequences].

    The padding behind a text is counted as a text of its own.
    """
    places = torch.arange(length, device=ends.device).expand(len(ends), -1)
    return places - torch.where(places >= ends[:, None], ends[:, None], 0)
