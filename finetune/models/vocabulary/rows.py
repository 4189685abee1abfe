"""The modules of an active vocabulary: a compact table that trains, and the frozen rows beside it.

Floor 2. `finetune.models.vocabulary` says what it is, and puts these in the place of a model's own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from finetune.compute.loss import FrozenRows

NO_TOKEN = -1


class ActiveVocabulary(nn.Module):
    """Which tokens are active, where every token's row is, and the frozen rows [V - A, d] of one table."""

    active_ids: Tensor  # [A + spare] int64, NO_TOKEN for a spare row
    row_of_id: Tensor  # [V] int64: below A + spare a row of the compact weight, else A + spare + a frozen row
    frozen_ids: Tensor  # [F] int64
    offset: Tensor  # [A + spare + F] float32: -inf where a row stands for no token, else 0
    is_whole: bool  # no row stands for no token
    padding_row: (
        int | None
    )  # of the compact weight: the lookup gives it no gradient, as padding_idx does in a plain embedding
    is_part_of_weight = (
        True  # for finetune.optim: what is set for the table's weight holds for the shift
    )
    shift: (
        nn.Parameter | None
    )  # [d]: the row of an active token is that of the compact weight plus this
    frozen_mass: (
        Tensor | None
    )  # [F] float32: what the chances of a sample of the frozen rows follow, kept here to be saved
    _narrow: Tensor | None = (
        None  # the frozen rows in the dtype of the products, where that is another
    )

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
        self.to(
            table.device
        )  # numbered before: a table on the meta device has a vocabulary too, for planning
        # A parameter without gradient, and no buffer: data-parallel engines leave it alone after the start.
        frozen = _in_dtype(table.detach().index_select(0, self.frozen_ids), frozen_dtype)
        self.frozen = nn.Parameter(frozen, requires_grad=False)
        self.shift = nn.Parameter(torch.zeros_like(table[0])) if shift else None

    @property
    def num_active(self) -> int:
        """A: the tokens whose rows train."""
        return int((self.active_ids != NO_TOKEN).sum())

    def number(self) -> None:
        """Work out where every token's row is, from `active_ids`."""
        rows, used = len(self.active_ids), self.active_ids != NO_TOKEN
        ids = self.active_ids[used]
        self.row_of_id[self.frozen_ids] = torch.arange(
            rows, rows + len(self.frozen_ids), device=ids.device
        )
        self.row_of_id[ids] = used.nonzero()[:, 0]
        self.offset.zero_()
        self.offset[:rows][~used] = -torch.inf
        self.offset[rows:][
            torch.isin(self.frozen_ids, ids)
        ] = -torch.inf  # of tokens that have become active
        self.is_whole = bool(self.offset.isfinite().all())

    def active_rows(self, weight: Tensor) -> Tensor:
        """The rows [A + spare, d] that the compact `weight` stands for."""
        return weight if self.shift is None else weight + self.shift

    def frozen_rows(self) -> FrozenRows:
        """What the loss needs beside the compact weight: all frozen rows."""
        return FrozenRows(self.frozen_in_products(), None if self.is_whole else self.offset)

    def frozen_in_products(self) -> Tensor:
        """The frozen rows [F, d] in the dtype of matrix products: autocast's, where it is on.

        They do not change, so a narrower copy is made once and kept: otherwise each step and each generated token would make one.
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
        """Make `ids` [n] active as far as there are spare rows in the compact `weight`; returns those for which there was none."""
        new = ids[~torch.isin(ids, self.active_ids)].unique()
        room = (self.active_ids == NO_TOKEN).nonzero()[:, 0][: len(new)]
        taken = new[: len(room)]
        rows = self.frozen[self.row_of_id[taken] - len(self.active_ids)].to(weight.dtype)
        weight[room] = rows if self.shift is None else rows - self.shift
        self.active_ids[room] = taken
        self.number()
        return new[len(room) :]

    def full_table(self, weight: Tensor) -> Tensor:
        """[V, d] in the dtype of the compact `weight`; the rows of frozen tokens bit for bit as they came."""
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
    """The lookup that sits below an embedding's own class; `weight` is [A + spare, d]."""

    compact = True  # for finetune.optim: there are no unused rows to leave out
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
    """The product with every row, [..., d] to logits [..., V] in the order of the token ids; `weight` is [A + spare, d]."""

    vocabulary: ActiveVocabulary
    plain_class: type[nn.Module]

    @property
    def rows(self) -> Tensor:
        """[A + spare, d]: the weight of the product, before the frozen rows."""
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
