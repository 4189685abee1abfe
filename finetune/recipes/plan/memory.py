"""What a run needs of memory and disk, added up from counts, and what this machine has.

Floor 1. `finetune.models.rehearsal` measures what a step holds beside weights and optimizer state; here is the arithmetic.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from finetune.models.rehearsal import StepMemory

FP32 = 4  # bytes; master weights, gradients and checkpoints
CUDA_CONTEXT = 600 * 2**20  # bytes: the context and the workspaces of cuBLAS, an assumption
HOLES = {"cpu": 0.5, "cuda": 0.1}
"""Memory that the allocator holds and cannot use, as a share of the activations: they are freed one by one while gradients of other
sizes come. For glibc's heap measured on SmolLM2-135M (seven runs, full and LoRA, packed and padded: 0.3 to 0.8); for CUDA an
assumption."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory by part, and the most that is in use at once at each moment of a run, all in bytes."""

    baseline: int  # the process before there is a model: Python, the libraries, the data
    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    loss: int
    moments: dict[str, int]  # moment of the run -> memory in use, everything included

    @property
    def peak(self) -> int:
        return max(self.moments.values())


def add_up(
    *,
    baseline: int,
    weights: int,
    gradients: int,
    optimizer_state: int,
    step: StepMemory,
    readings: dict[str, int],
    export: int,
    device: str,
) -> MemoryEstimate:
    """`readings`: what evaluation and generation allocate. `export`: what the export allocates."""
    standing = baseline + weights + optimizer_state
    moments = {"training step": standing + step.peak + round(HOLES[device] * step.activations)}
    moments |= {name: standing + allocated for name, allocated in readings.items()}
    if export:
        moments["export"] = standing + export
    return MemoryEstimate(
        baseline, weights, gradients, optimizer_state, step.activations, step.loss, moments
    )


def optimizer_state_bytes(
    model: nn.Module,
    bytes_per_parameter: float,
    *,
    sparse_tables: Iterable[nn.Embedding],
    used_rows: int,
) -> int:
    """State of every trainable parameter; of a row-sparse table, that of the rows in use alone."""
    tables = {id(table.weight) for table in sparse_tables}
    total = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            count = used_rows * parameter.shape[1] if id(parameter) in tables else parameter.numel()
            total += count * bytes_per_parameter
    return round(total)


def machine_memory(device: torch.device) -> tuple[int, int]:
    """(All, free) bytes that a process may use here: of the GPU, or of main memory within the limit of a container."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    total = min(memory.total, _container_limit() or memory.total)
    return total, min(total, memory.available + process_memory())


def process_memory() -> int:
    """Bytes of main memory that this process holds."""
    return psutil.Process().memory_info().rss


def _container_limit() -> int | None:
    for path in (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None
