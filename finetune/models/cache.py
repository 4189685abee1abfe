"""Keys and values that grow by a token a step, written into room that is there already.

transformers' own layer of a cache joins old and new into a fresh tensor at each step, so that each
token of an answer copies the whole cache.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

SPARE = 64
"""Places that are made in advance; a quarter of what is held already, if that is more."""


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer, [batch, heads, length, d], as views of larger tensors."""

    rooms: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens; return those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = cast(tuple[Tensor, Tensor], (self.keys, self.values))
        rooms = self.rooms or held
        key_room, keys = _appended(rooms[0], held[0], key_states)
        value_room, values = _appended(rooms[1], held[1], value_states)
        self.rooms, self.keys, self.values = (key_room, value_room), keys, values
        return keys, values


def make_room(cache: Any) -> None:
    """Let the layers of a cache that keep all tokens grow in place. Others stay as they are."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = RoomyLayer


def can_join(cache: Any) -> bool:
    """Return whether rows of another cache can be appended to a cache's, by `join_caches`."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(
        type(layer) is RoomyLayer and layer.is_initialized for layer in layers
    )


def join_caches(cache: Any, other: Any) -> None:
    """Append the rows of `other` to those of `cache`. The shorter one is padded on the left."""
    for layer, its in zip(cache.layers, other.layers, strict=True):
        layer.keys = join_rows(layer.keys, its.keys, dim=-2)
        layer.values = join_rows(layer.values, its.values, dim=-2)


def cut_start(cache: Any, places: int) -> None:
    """Leave out the first places of all layers."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, places:], layer.values[:, :, places:]


def join_rows(one: Tensor, other: Tensor, *, dim: int) -> Tensor:
    """Return the rows of two tensors. The shorter one gets zeros in front, along `dim`, below 0."""
    longest = max(one.shape[dim], other.shape[dim])
    behind = [0, 0] * (-1 - dim)
    return torch.cat([pad(each, (*behind, longest - each.shape[dim], 0)) for each in (one, other)])


def _appended(room: Tensor, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return the room and the view of it that has `held` and, after it, `new`."""
    length = held.shape[-2] if held.numel() else 0
    total = length + new.shape[-2]
    # What was reordered, or cut out of another tensor, is no view of the room any more.
    if held.data_ptr() != room.data_ptr() or total > room.shape[-2] or not length:
        spare = max(SPARE, total // 4)
        room = new.new_empty(*new.shape[:2], total + spare, new.shape[3])
        if length:
            room[:, :, :length] = held
    room[:, :, length:total] = new
    return room, room[:, :, :total]
