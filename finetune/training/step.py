"""One optimizer step, from a batch to changed weights. The trainer, `finetune plan` and a loop of
your own take the same one.

**Loss.** Every target token weighs the same, however a step is cut. The sum of the token losses of
a micro-batch is divided by the number of target tokens of the whole step. That number is over all
micro-batches and processes. Data-parallel engines average gradients over processes, hence the
factor `num_processes`. So 1 x 8 = 8 x 1 = 2 x 4 sequences, on one process or on many.

**Where things happen.** Autocast and fp16 scaling come with the module and the optimizer from
`accelerator.prepare`. The loss of a large head computes its gradient in the forward already
(`finetune.compute.loss`). DDP and FSDP2 average dense gradients in the last backward.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from finetune.compute.exact import float64_device
from finetune.data.batches.steps import StepBatch
from finetune.optim import clip_grad_norm_


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found out, the same on every process."""

    loss: float  # nats per target token, before the step
    grad_norm: float  # over all gradients, before clipping
    skipped: bool  # the fp16 scaler found an overflow and left the weights as they were


def take_step(
    module: torch.nn.Module,
    optimizer: AcceleratedOptimizer,
    batch: StepBatch,
    *,
    accelerator: Accelerator,
    max_grad_norm: float = 0.0,
    average_rows: Callable[[], None] = lambda: None,
    check: Callable[[StepResult], None] = lambda result: None,
) -> StepResult:
    """Compute the gradients of `batch`, clip them, and step the optimizer.

    `module` maps a micro-batch to the sum of its token losses in nats (see `LanguageModel`). Module
    and optimizer come from `accelerator.prepare`; every process calls with its share of the batch.
    `max_grad_norm`: 0 leaves gradients as they are. `average_rows` averages row-sparse gradients
    over processes (see `finetune.distributed`). `check` is called before the optimizer steps; if it
    raises, the weights are untouched.
    """
    module.train()
    optimizer.train()  # schedule-free optimizers train at one point and are evaluated at another
    device = accelerator.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=float64_device(device))
    scale = accelerator.num_processes / batch.num_target_tokens
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        tensors = cast(dict[str, torch.Tensor], micro_batch)
        on_device = {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
        is_last = number == len(batch.micro_batches)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(module):
            loss = module(**on_device)
            accelerator.backward(loss * scale)
        loss_sum += loss.detach().to(loss_sum.device)
    average_rows()
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(optimizer)
    norm = clip_grad_norm_(module.parameters(), max_grad_norm or math.inf)
    total = accelerator.reduce(loss_sum, reduction="sum")
    result = StepResult(float(total) / batch.num_target_tokens, float(norm), skipped=False)
    check(result)
    scaler = accelerator.scaler
    scaled_by = scaler.get_scale() if scaler is not None else 0.0
    optimizer.step()
    optimizer.zero_grad()
    # `step_was_skipped` says nothing of a fused kernel, which is called and skips the step itself
    skipped = scaler is not None and scaler.get_scale() < scaled_by
    return StepResult(result.loss, result.grad_norm, skipped)
