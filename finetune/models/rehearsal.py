"""How much memory a step of a model takes, measured by running it on tensors without data.

The model runs forward, loss and backward under torch's FakeTensorMode
(https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html). Every operation is
dispatched as on the real device, autocast and the choice of attention kernel included, and only
shapes are computed. A dispatch mode sees every new storage and, through a weak reference, its end.
So the bytes alive at any moment are known.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import moe

from finetune.compute import products
from finetune.compute.loss import FrozenRows, linear_cross_entropy
from finetune.errors import UserError
from finetune.models.describe import inner_model
from finetune.models.fuse import BY_EXAMPLE, fuse, has_plain_head, output_head
from finetune.models.language_model import keeping_casts


@dataclass(frozen=True)
class StepMemory:
    """What one optimizer step allocates in addition to weights and optimizer state, in bytes."""

    activations: int  # kept for the backward at the end of the forward
    loss: int  # the most that the loss adds: one chunk of logits, and the gradient of the head
    kept: int  # buffers that stay for the next step: a chunk of logits, on a CPU
    peak: int  # the most alive at once, with gradients; they come as activations go


class LiveBytes(TorchDispatchMode):
    """The bytes of the storages that operations inside it make, while they live."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Those that are known already are not counted.
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class Rehearsal:
    """A skeleton (see `load_skeleton`) that runs without data, as on `device`.

    The skeleton itself becomes that model. `sparse_tables`: embeddings that get row-sparse
    gradients.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel | PeftModel,
        *,
        device: str,
        autocast: torch.dtype | None,
        sparse_tables: Sequence[nn.Embedding],
    ) -> None:
        self.model, self.device, self.autocast = skeleton, device, autocast
        # How many frozen rows of an active vocabulary are drawn for a step; None: all take part.
        self.num_sampled: int | None = None
        self.sparse_width = sum(table.embedding_dim for table in sparse_tables)
        fuse(inner_model(skeleton))  # as `LanguageModel` does
        self.mode = FakeTensorMode()
        with self.mode:
            _without_data(skeleton, device)
        for table in sparse_tables:
            # A fake tensor cannot be sparse: its gradient is added by hand.
            table.weight.requires_grad_(False)

    def step(
        self, *, sequences: int, length: int, num_targets: int, packed: bool, accumulates: bool
    ) -> StepMemory:
        """Return the memory of forward, loss and backward of a micro-batch.

        It has `sequences` of `length` tokens, and `num_targets` target tokens. `accumulates`: the
        gradients of an earlier micro-batch exist already.
        """
        self.model.train()
        # Attention by example keeps the same for packed and padded sequences.
        packed = packed and inner_model(self.model).config._attn_implementation != BY_EXAMPLE
        live = LiveBytes([*self.model.parameters(), *self.model.buffers()])
        with self.mode, live, _packing(packed), _experts(self.model):
            for _ in range(2 if accumulates else 1):
                before, live.peak = live.now, live.now
                with self._autocast():
                    states = self._decoder(sequences, length).flatten(0, 1)
                    activations, live.peak = live.now - before, live.now
                    loss = self._loss(states, num_targets)
                del states
                in_loss = live.peak - before - activations
                loss.backward()
                del loss
            peak = live.peak
            kept = products.rehearsed_bytes()
            products.release()
        self.model.zero_grad()
        sparse_gradients = sequences * length * self.sparse_width * 4
        return StepMemory(activations, in_loss, kept, peak + sparse_gradients)

    def inference(self, *, sequences: int, length: int, num_logits: int, use_cache: bool) -> int:
        """Return the most that a forward without gradients allocates, in bytes.

        It makes the logits of `num_logits` tokens at once. With `use_cache` it answers.
        """
        self.model.eval()
        live = LiveBytes([*self.model.parameters(), *self.model.buffers()])
        with (
            self.mode,
            live,
            _packing(False),
            _experts(self.model),
            torch.no_grad(),
            self._autocast(),
            keeping_casts(self.model) if use_cache else contextlib.nullcontext(),
        ):
            model = inner_model(self.model)
            ids = torch.zeros(sequences, length, dtype=torch.int64, device=self.device)
            plain = has_plain_head(model)
            output = (model.base_model if plain else model)(input_ids=ids, use_cache=use_cache)
            if plain:
                head = model.get_output_embeddings()
                logits = head(output[0].flatten(0, 1)[:num_logits]).float()
                del logits
            return live.peak

    def _decoder(self, sequences: int, length: int) -> Tensor:
        model = inner_model(self.model)
        ids = torch.zeros(sequences, length, dtype=torch.int64, device=self.device)
        positions = torch.zeros(sequences, length, dtype=torch.int64, device=self.device)
        if has_plain_head(model):
            return model.base_model(
                input_ids=ids, position_ids=positions, use_cache=False
            ).last_hidden_state
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    def _loss(self, states: Tensor, num_targets: int) -> Tensor:
        model = inner_model(self.model)
        targets = torch.zeros(num_targets, dtype=torch.int64, device=self.device)
        chosen = states.index_select(0, targets)
        if not has_plain_head(model):
            return F.cross_entropy(chosen.float(), targets, reduction="sum")
        head = output_head(model)
        frozen = head.frozen
        if frozen is not None and self.num_sampled is not None:
            frozen = FrozenRows(frozen.weight[: self.num_sampled].clone())
        return linear_cross_entropy(
            chosen, head.weight, targets, bias=head.bias, frozen=frozen, softcap=head.softcap
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.autocast)


def _without_data(model: nn.Module, device: str) -> None:
    """Put a fake tensor in the place of every parameter and buffer; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    made[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else fake
                    )
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


@contextlib.contextmanager
def _packing(packed: bool) -> Iterator[None]:
    """Let transformers know whether sequences are packed.

    It reads that from the values of the position ids, and a fake tensor has none.
    """
    find = masking_utils.find_packed_sequence_indices
    if not packed:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


@contextlib.contextmanager
def _experts(model: nn.Module) -> Iterator[None]:
    """Let a mixture of experts run without data.

    torch's grouped product knows bf16 alone then; transformers' own takes the same memory. Raises
    UserError if the model decides from the data how much it computes.
    """
    can_use = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *args, **kwargs: False
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"{type(model).__name__} decides from its data how much it computes, so its memory "
            "cannot be worked out in advance. Start the run, and look at its first steps"
        ) from error
    finally:
        moe._can_use_grouped_mm = can_use
