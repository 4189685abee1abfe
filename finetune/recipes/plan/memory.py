"""The memory that a run needs, added up from counts, and the memory that this machine has.

`finetune.models.rehearsal` measures what a step holds in addition to weights and optimizer state.
The rest is arithmetic.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from finetune.models.rehearsal import StepMemory

FP32 = 4  # bytes a value: master weights, gradients and checkpoints
CUDA_CONTEXT = 600 * 2**20  # bytes: the context and the workspaces of cuBLAS, an assumption
FRAGMENTATION = {"cpu": 0.8, "cuda": 0.1}
"""Memory that the allocator holds and cannot use, as a share of the activations.

Activations are freed one by one, while gradients of other sizes are allocated. The share for the
heap of glibc is the highest of those seen: it was 0.3 to 0.8 for both demos in seven modes, on
three chips (`scripts/bench_plan.py`). The share for CUDA is an assumption.
"""
LATER = {"cpu": 200_000_000, "cuda": 0}
"""Bytes that a process takes after the plan was made: libraries that are loaded later, code that is
made at run time, the buffers of products.

80 MB with a model of 3 MB, and up to 200 with SmolLM2-135M.
"""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory by part, and the most in use at once in each phase of a run, all in bytes."""

    baseline: int  # the process before it has a model: Python, the libraries, the data
    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    loss: int
    phases: dict[str, int]  # phase of the run -> the most in use at once, everything included

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def estimate_memory(
    *,
    baseline: int,
    weights: int,
    gradients: int,
    optimizer_state: int,
    step: StepMemory,
    inference: dict[str, int],
    export: int,
    device: str,
) -> MemoryEstimate:
    """Return the memory of a run, from the bytes of its parts.

    `inference`: phase -> what it allocates, for evaluation and generation. `export`: what the
    export allocates. `device` is "cpu" or "cuda".
    """
    baseline += LATER[device]
    resident = baseline + weights + optimizer_state  # in every phase
    unusable = round(FRAGMENTATION[device] * step.activations)
    phases = {"training step": resident + step.peak + unusable}
    phases |= {name: resident + step.kept + allocated for name, allocated in inference.items()}
    if export:
        phases["export"] = resident + export
    return MemoryEstimate(
        baseline, weights, gradients, optimizer_state, step.activations, step.loss, phases
    )


def optimizer_state_bytes(
    model: nn.Module,
    bytes_per_parameter: float,
    *,
    sparse_tables: Iterable[nn.Embedding],
    used_rows: int,
) -> int:
    """Return the bytes of the state of all trainable parameters.

    Of a table in `sparse_tables` only `used_rows` rows have state.
    """
    tables = {id(table.weight) for table in sparse_tables}
    total = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            count = used_rows * parameter.shape[1] if id(parameter) in tables else parameter.numel()
            total += count * bytes_per_parameter
    return round(total)


def machine_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that a process may use here, and how many of them are free.

    They are those of the GPU, or those of main memory within the limit of a container.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    total = min(memory.total, _container_limit() or memory.total)
    return total, min(total, memory.available + process_memory())


def process_memory() -> int:
    """Return the bytes of main memory that this process holds."""
    return psutil.Process().memory_info().rss


def _container_limit() -> int | None:
    """Return the bytes that the container may use, or None if it has no limit."""
    for path in (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None
