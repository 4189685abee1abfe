"""The loss over held-out data, exact to the token.

Floor 3. Sum over sum: the nats of all target tokens divided by their number, so that the result depends neither on how the data is
cut into batches nor on the number of processes (up to the rounding of the forward pass).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch

from finetune.data.rendering import Tokenizer
from finetune.data.types import IGNORE_INDEX, Batch
from finetune.errors import UserError
from finetune.metrics import bits_per_byte, perplexity
from finetune.models.language_model import evaluating


@dataclass(frozen=True, slots=True)
class LossResult:
    """What evaluate_loss found.

    `bits_per_byte` spreads all nats, those of end marks included, over the UTF-8 bytes of the target text, which has no special
    tokens: a model pays for knowing where to stop, and gets no bytes for it.
    """

    loss: float  # nats per target token
    perplexity: float
    bits_per_byte: float
    num_target_tokens: int
    num_target_bytes: int


def evaluate_loss(
    loss_module: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    tokenizer: Tokenizer,
    device: torch.device,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    on_progress: Callable[[int], None] | None = None,
) -> LossResult:
    """Return the loss over all target tokens of `batches`.

    `loss_module(input_ids=, labels=[, position_ids=])` returns the sum of the token losses of a batch, in nats. It is put in
    evaluation mode and back. `batches` are this process's share; `reduce` adds the float64 tensor [nats, target tokens, target
    bytes] up over the processes. `on_progress(n)` is called after the n-th batch. Raises UserError if there is no target token.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    with evaluating(loss_module), torch.inference_mode():
        for number, batch in enumerate(batches, start=1):
            tensors = cast(dict[str, torch.Tensor], batch)
            nats = float(loss_module(**{name: tensor.to(device) for name, tensor in tensors.items()}))
            num_tokens = int((batch["labels"] != IGNORE_INDEX).sum())
            sums += torch.tensor([nats, num_tokens, count_target_bytes(batch["labels"], tokenizer)], dtype=torch.float64)
            if on_progress is not None:
                on_progress(number)
    total_nats, num_tokens, num_bytes = reduce(sums).tolist()
    if not num_tokens:
        raise UserError("the held-out data has no target token, so there is no loss to compute: give other data, or more of it")
    loss = total_nats / num_tokens
    return LossResult(loss, perplexity(loss), bits_per_byte(total_nats, int(num_bytes)), int(num_tokens), int(num_bytes))


def count_target_bytes(labels: torch.Tensor, tokenizer: Tokenizer) -> int:
    """Return the UTF-8 bytes of the target text in `labels` [rows, length]: each unbroken span of targets decoded by itself."""
    num_bytes = 0
    for row in labels.tolist():
        span: list[int] = []
        for label in [*row, IGNORE_INDEX]:
            if label != IGNORE_INDEX:
                span.append(label)
            elif span:
                num_bytes += len(tokenizer.decode(span, skip_special_tokens=True).encode())
                span = []
    return num_bytes
