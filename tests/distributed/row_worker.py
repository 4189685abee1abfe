"""One process of the tests of row gradients: `python row_worker.py FOLDER`, once for each rank.

It is started with torch's environment variables. It does everything that needs more than one
process, in one start, and leaves what it found in FOLDER/rank<r>.pt. The tests read it.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.distributed import RowGradients, keep_tables_out_of_ddp
from finetune.optim import LazyAdamW, clip_grad_norm_
from finetune.recipes.train.train import run_training
from tests.distributed.processes import log_to

Digest = tuple[str, str]  # of all parameters, and of the optimizer's state

# One gradient, averaged

VOCABULARY, WIDTH = 50, 16
USED: dict[
    str, Callable[[int, int], list[int] | None]
] = {  # (rank, number of processes) -> ids, with repeats; None: no gradient
    "overlapping": lambda rank, processes: [1, 7, 7, 3 + rank, 40 - rank],
    "disjoint": lambda rank, processes: [10 * rank, 10 * rank + 5, 10 * rank],
    "the same rows": lambda rank, processes: [
        9,
        2,
        9,
        4,
        11,
        30,
    ],  # all-reduced with three processes
    "one has many": lambda rank, processes: (
        list(range(VOCABULARY)) if rank == 1 else [3]
    ),  # all-reduced with three processes
    "one has none": lambda rank, processes: [] if rank == 0 else [5, 6, 5],
    "one has no gradient": lambda rank, processes: None if rank == processes - 1 else [5, 6, 5],
    "none has rows": lambda rank, processes: [],
    "none has a gradient": lambda rank, processes: None,
}


def gradient(case: str, rank: int, num_processes: int, dtype: torch.dtype) -> Tensor | None:
    """The uncoalesced gradient of one process; whoever asks gets the same."""
    ids = USED[case](rank, num_processes)
    if ids is None:
        return None
    values = torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(rank)).to(dtype)
    return torch.sparse_coo_tensor(
        torch.tensor([ids], dtype=torch.int64), values, (VOCABULARY, WIDTH), check_invariants=True
    )


def averages(dtype: torch.dtype) -> dict[str, Any]:
    """For each case: whether the average is coalesced, its rows and values, the first message."""
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # other weights everywhere
    table = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
    said: list[str] = []
    rows = RowGradients(LazyAdamW(table.parameters(), embeddings=[table]), say=said.append)
    found: dict[str, Any] = {"weight": table.weight.detach().clone(), "said": said}
    for case in USED:
        table.weight.grad = gradient(case, rank, num_processes, dtype)
        rows.average()
        grad = table.weight.grad
        found[case] = (
            None if grad is None else (grad.is_coalesced(), grad.indices()[0], grad.values())
        )
    return found


# Many steps of a small model, whose batches one process can have all of

NUM_STEPS = 200
ROWS, CLASSES = 300, 8


class Classifier(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.head = nn.Embedding(ROWS, 16), nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """The summed loss of telling each id's class."""
        return cross_entropy(self.head(self.table(ids)), ids % CLASSES, reduction="sum")


def micro_batches(step: int, rank: int) -> list[Tensor]:
    """Two, of Zipf ids; every fourth step one process has none, every tenth all have the same."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    size = 0 if step % 4 == 3 and step // 4 % 3 == rank else 8 + step % 5
    if step % 10 == 5:
        return [torch.arange(size) % 4, torch.arange(size) % 3]
    ids = (ROWS ** torch.rand(2, size, generator=generator)).long() - 1
    return list(ids)


def train_classifier(
    ranks: range, num_processes: int, optimizer_class: Any = LazyAdamW
) -> tuple[Classifier, list[float]]:
    """NUM_STEPS steps over the batches of the processes `ranks` of so many.

    Gives the model, its rows up to date, and the norms.
    """
    classifier = Classifier(
        seed=ranks[0]
    )  # other weights everywhere: those of process 0 are what all train
    lazy = {"embeddings": [classifier.table]} if optimizer_class is LazyAdamW else {}
    optimizer = optimizer_class(classifier.parameters(), weight_decay=0.1, **lazy)
    keep_tables_out_of_ddp(classifier, optimizer)
    model = (
        DistributedDataParallel(classifier, broadcast_buffers=False)
        if dist.is_initialized()
        else classifier
    )
    rows = RowGradients(optimizer, say=lambda text: None)
    norms = []
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / NUM_STEPS)
        count = sum(len(ids) for rank in range(num_processes) for ids in micro_batches(step, rank))
        own = [ids for rank in ranks for ids in micro_batches(step, rank)]
        for i, ids in enumerate(own):
            wait = isinstance(model, DistributedDataParallel) and i + 1 < len(own)
            with model.no_sync() if wait else contextlib.nullcontext():
                (model(ids) * rows.num_processes / count).backward()
        rows.average()
        norms.append(float(clip_grad_norm_(model.parameters(), 0.3)))
        optimizer.step()
        optimizer.zero_grad()
        if step % 7 == ranks[0]:  # somebody looks, each at something else and at another time
            with torch.no_grad():
                classifier(torch.arange(11 * ranks[0], 11 * ranks[0] + step))
                classifier.state_dict()
    if isinstance(optimizer, LazyAdamW):
        optimizer.flush()
    return classifier, norms


# Whole runs


class Run(NamedTuple):
    name: str
    tree: dict[str, Any]  # for make_config
    options: dict[str, Any]  # of run_training
    port: int


@contextlib.contextmanager
def digests() -> Iterator[list[Digest]]:
    """Hash all bits of parameters and state after each step of any optimizer within it.

    But for the trial of an optimizer's options, which steps over one small matrix.
    """
    steps: list[Digest] = []

    @torch.no_grad()
    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        if len(parameters) == 1:
            return
        state = [value for parameter in parameters for value in optimizer.state[parameter].values()]
        steps.append((_hash(parameters), _hash(state)))

    hook = register_optimizer_step_post_hook(record)
    try:
        yield steps
    finally:
        hook.remove()


def _hash(tensors: list[Tensor]) -> str:
    whole = hashlib.blake2b()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def run(tree: dict[str, Any], **options: Any) -> list[Digest]:
    """Train as the config says."""
    with digests() as steps:
        assert (
            run_training(make_config(tree), display=Display(enabled=False), **options) == "finished"
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    return steps


def main(folder: Path, rank: int, num_processes: int, runs: list[Run], port: int) -> None:
    """Everything, as process `rank` of so many."""
    log_to(folder / f"rank{rank}.log")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    found: dict[str, Any] = {"digests": {}}
    for one in runs:
        os.environ["MASTER_PORT"] = str(one.port)  # the end of a run takes the process group down
        found["digests"][one.name] = run(one.tree, **one.options)
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("gloo")
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype)] = averages(dtype)
    with digests() as steps:
        model, norms = train_classifier(range(rank, rank + 1), num_processes)
    found |= {"classifier": model.state_dict(), "norms": norms}
    found["digests"]["classifier"] = steps
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
