"""The modules of an active vocabulary: a compact table that trains, and the rows that are frozen.

`finetune.models.vocabulary.activate` puts them in the place of a model's own modules.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from finetune.compute.loss import FrozenRows

NO_TOKEN = -1


class ActiveVocabulary(nn.Module):
    """The tokens that are active, the place of every token's row, and one table's frozen rows.

    A tokens are active, and F = V - A rows are frozen at the start.
    """

    active_ids: Tensor  # [A + spare] int64, NO_TOKEN for a spare row
    # [V] int64: below A + spare, a row of the compact weight; else A + spare + a frozen row.
    row_of_id: Tensor
    frozen_ids: Tensor  # [F] int64
    offset: Tensor  # [A + spare + F] float32: -inf for a row that belongs to no token, else 0
    is_whole: bool  # every row belongs to a token
    # A row of the compact weight that the lookup gives no gradient, like padding_idx in a plain
    # embedding.
    padding_row: int | None
    # Read by finetune.optim.groups: overrides for the table's weight also apply to the shift.
    is_part_of_weight = True
    shift: nn.Parameter | None  # [d], added to every row of the compact weight
    # [F] float32: what the chances of the frozen rows to be drawn follow; here it is saved.
    frozen_mass: Tensor | None
    _narrow: Tensor | None = None  # the frozen rows in the dtype of the products, if it is another

    def __init__(
        self,
        table: Tensor,
        ids: Tensor,
        *,
        padding_idx: int | None,
        spare: int = 0,
        shift: bool = False,
        frozen_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        active = torch.zeros(len(table), dtype=torch.bool)
        active[ids.cpu()] = True
        frozen_ids = (~active).nonzero()[:, 0]
        padded = F.pad(active.nonzero()[:, 0], (0, min(spare, len(frozen_ids))), value=NO_TOKEN)
        self.register_buffer("active_ids", padded)
        self.register_buffer("frozen_ids", frozen_ids, persistent=False)
        self.register_buffer("frozen_mass", None)
        self.register_buffer(
            "row_of_id", torch.empty(len(table), dtype=torch.int64), persistent=False
        )
        self.register_buffer("offset", torch.empty(len(padded) + len(frozen_ids)), persistent=False)
        self.number()
        self.padding_row = (
            int(self.row_of_id[padding_idx])
            if padding_idx is not None and active[padding_idx]
            else None
        )
        # After the numbering: a table on the meta device also has a vocabulary, for planning.
        self.to(table.device)
        # A parameter without gradient, not a buffer: data-parallel engines do not touch it after
        # the start.
        frozen = _in_dtype(table.detach().index_select(0, self.frozen_ids), frozen_dtype)
        self.frozen = nn.Parameter(frozen, requires_grad=False)
        self.shift = nn.Parameter(torch.zeros_like(table[0])) if shift else None

    @property
    def num_active(self) -> int:
        """The number of tokens whose rows train, A."""
        return int((self.active_ids != NO_TOKEN).sum())

    def number(self) -> None:
        """Set the place of every token's row, from `active_ids`."""
        rows, used = len(self.active_ids), self.active_ids != NO_TOKEN
        ids = self.active_ids[used]
        self.row_of_id[self.frozen_ids] = torch.arange(
            rows, rows + len(self.frozen_ids), device=ids.device
        )
        self.row_of_id[ids] = used.nonzero()[:, 0]
        self.offset.zero_()
        self.offset[:rows][~used] = -torch.inf
        became_active = torch.isin(self.frozen_ids, ids)
        self.offset[rows:][became_active] = -torch.inf
        self.is_whole = bool(self.offset.isfinite().all())

    def active_rows(self, weight: Tensor) -> Tensor:
        """Return the rows [A + spare, d] of the compact `weight`, with the shift added."""
        return weight if self.shift is None else weight + self.shift

    def frozen_rows(self) -> FrozenRows:
        """Return all frozen rows, which the loss needs in addition to the compact weight."""
        return FrozenRows(self.frozen_in_products(), None if self.is_whole else self.offset)

    def frozen_in_products(self) -> Tensor:
        """Return the frozen rows [F, d] in the dtype of matrix products: that of autocast, if on.

        They do not change, so a narrower copy is made once and kept. Otherwise each step and each
        generated token would make one.
        """
        frozen, device = self.frozen.detach(), self.frozen.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else frozen.dtype
        )
        if dtype == frozen.dtype or isinstance(frozen, FakeTensor):
            return frozen
        if self._narrow is None or (self._narrow.dtype, self._narrow.device) != (
            dtype,
            frozen.device,
        ):
            with torch.inference_mode(False):
                self._narrow = frozen.to(dtype)
        return self._narrow

    @torch.no_grad()
    def grow(self, weight: Tensor, ids: Tensor) -> Tensor:
        """Make `ids` [n] active, and return those for which there was no spare row.

        The spare rows are those of the compact `weight`.
        """
        new = ids[~torch.isin(ids, self.active_ids)].unique()
        room = (self.active_ids == NO_TOKEN).nonzero()[:, 0][: len(new)]
        taken = new[: len(room)]
        rows = self.frozen[self.row_of_id[taken] - len(self.active_ids)].to(weight.dtype)
        weight[room] = rows if self.shift is None else rows - self.shift
        self.active_ids[room] = taken
        self.number()
        return new[len(room) :]

    def full_table(self, weight: Tensor) -> Tensor:
        """Return the full table [V, d] in the dtype of the compact `weight`.

        The rows of frozen tokens are bit for bit as they came.
        """
        full = weight.new_empty(len(self.row_of_id), weight.shape[1])
        full[self.frozen_ids] = self.frozen.to(weight.dtype)
        used = self.active_ids != NO_TOKEN
        return full.index_copy_(0, self.active_ids[used], self.active_rows(weight).detach()[used])

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        mass = state_dict.get(prefix + "frozen_mass")
        self.frozen_mass = (
            None if mass is None else torch.empty_like(mass, device=self.frozen_ids.device)
        )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._narrow = None
        self.number()


class ActiveEmbedding(nn.Embedding):
    """The lookup that is put below an embedding's own class; `weight` is [A + spare, d]."""

    compact = True  # read by finetune.optim: the table has no unused rows
    vocabulary: ActiveVocabulary
    plain_class: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        rows, compact = self.vocabulary.row_of_id[input], len(self.weight)
        trained = F.embedding(rows.clamp(max=compact - 1), self.weight, self.vocabulary.padding_row)
        if self.vocabulary.shift is not None:
            trained = trained + self.vocabulary.shift.detach()
        if not len(self.vocabulary.frozen):
            return trained
        frozen = F.embedding((rows - compact).clamp_(min=0), self.vocabulary.frozen)
        return torch.where((rows < compact)[..., None], trained, frozen.to(trained.dtype))


class ActiveHead(nn.Linear):
    """The product with every row, [..., d] to logits [..., V] in the order of the token ids.

    `weight` is [A + spare, d].
    """

    vocabulary: ActiveVocabulary
    plain_class: type[nn.Module]

    @property
    def rows(self) -> Tensor:
        """The weight of the product, [A + spare, d], without the frozen rows."""
        return self.vocabulary.active_rows(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        frozen = self.vocabulary.frozen_in_products()
        if not torch.is_autocast_enabled(input.device.type):
            frozen = frozen.to(self.weight.dtype)
        logits = torch.cat([F.linear(input, self.rows), F.linear(input, frozen)], -1)
        return logits.index_select(-1, self.vocabulary.row_of_id)


def _in_dtype(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or rows.is_meta:
        return rows
    narrow = rows.to(dtype)
    return narrow if torch.equal(narrow.to(rows.dtype), rows) else rows
