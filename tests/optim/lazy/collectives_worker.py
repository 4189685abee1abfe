"""A process of test_collectives: each collective on a lazily stepped weight and on a dense twin."""

import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from finetune.errors import UserError
from finetune.optim import LazyAdamW
from tests.distributed.processes import log_to

ROWS, WIDTH = 8, 4


def tensors(count):
    return [torch.full((ROWS, WIDTH), float(number + 1)) for number in range(count)]


def pass_on(weight, rank, how):
    if rank == 0:
        (dist.send if how == "send" else lambda *a: dist.isend(*a).wait())(weight, 1)
    else:
        dist.recv(weight, 0)


def gathered(weight, gather):
    """Return what the processes receive of it."""
    received = tensors(2)
    gather(received, weight)
    return torch.stack(received)


WAYS = {
    "broadcast": lambda w, rank: dist.broadcast(w, 0),
    "broadcast of some rows": lambda w, rank: dist.broadcast(w[2:5], 1),
    "all_reduce": lambda w, rank: dist.all_reduce(w),
    "all_reduce, async": lambda w, rank: dist.all_reduce(w, async_op=True).wait(),
    "broadcast, async": lambda w, rank: dist.broadcast(w, 0, async_op=True).wait(),
    "reduce": lambda w, rank: dist.reduce(w, 0),
    "send": lambda w, rank: pass_on(w, rank, "send"),
    "isend": lambda w, rank: pass_on(w, rank, "isend"),
    "scatter": lambda w, rank: dist.scatter(w, tensors(2) if rank == 0 else None, 0),
    "all_gather of it": lambda w, rank: gathered(w, dist.all_gather),
    "gather of it": lambda w, rank: gathered(
        w, lambda received, w: dist.gather(w, None if rank else received, 0)
    ),
    "reduce_scatter": lambda w, rank: dist.reduce_scatter(w, tensors(2)),
}


def train(module, optimizer, steps, rank):
    for step in steps:
        optimizer.zero_grad()
        module(torch.tensor([step % 3, 3 + step % 2 + 2 * rank])).sin().sum().backward()
        optimizer.step()


def twins(dtype, rank):
    pairs = []
    for kind in ("lazy", "dense"):
        torch.manual_seed(0)
        module = nn.Embedding(ROWS, WIDTH).to(dtype if kind == "lazy" else torch.float32)
        options = {"lr": 0.05, "weight_decay": 0.3}
        if kind == "lazy":
            optimizer = LazyAdamW(module.parameters(), embeddings=[module], **options)
        else:
            optimizer = torch.optim.AdamW(module.parameters(), foreach=False, **options)
        train(module, optimizer, range(6), rank)
        pairs.append((module, optimizer))
    return pairs


def main(folder: Path, rank: int) -> None:
    log_to(folder / f"rank{rank}.log")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    errors = {}
    for name, way in WAYS.items():
        for dtype in (torch.float32, torch.bfloat16)[: 2 if name == "broadcast" else 1]:
            pairs = twins(dtype, rank)
            found = []
            for module, optimizer in pairs:
                result = way(module.weight.data, rank)
                received = result if isinstance(result, torch.Tensor) else torch.zeros(1)
                train(module, optimizer, range(6, 10), rank)
                found.append((module.weight.detach().float(), received))
            errors[f"{name}, {dtype}"] = max(
                float((ours - theirs).abs().max()) for ours, theirs in zip(*found, strict=True)
            )
    (module, _), _ = twins(torch.float32, rank)
    try:
        dist.irecv(module.weight.data, 1 - rank)
    except UserError as error:
        errors["irecv"] = str(error)
    torch.save(errors, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
