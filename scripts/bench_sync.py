"""What averaging an embedding's gradient over processes costs: a dense all-reduce, and our rows.

    python scripts/bench_sync.py              2, 3 and 4 processes, vocabularies of 32k to 256k
                                              (about 4 GB of memory, minutes)
    python scripts/bench_sync.py --quick      2 processes, 32k and 256k, under a minute
    python scripts/bench_sync.py --svg FILE   also draws the projection

At each step each process draws `--tokens` Zipf ids (the i-th most frequent with a chance of 1/i).
It averages the gradient of those rows, gloo over loopback. Time: the median of the steps, on the
slowest process; "dense" is the bare all-reduce, without filling a dense gradient. Bytes: what the
kernel counted on the loopback device, for each process and step, in a network namespace of its own
if the system lets one be made. The last line is JSON.

The formula of row_traffic.py is then projected to 8, 64 and 1,024 processes.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from row_traffic import crossings, draw, formula_dense, formula_rows, print_projected, projection
from torch import Tensor, nn

from finetune.distributed import RowGradients
from finetune.optim import LazyAdamW

VOCABULARIES, PROCESSES = [v << 10 for v in (32, 64, 128, 256)], [2, 3, 4]
QUICK_SIZES = [32 << 10, 256 << 10], [2]
PROJECTED = [2, 8, 64, 1024]
OWN_NAMESPACE = "FINETUNE_BENCH_NAMESPACE"


def bytes_on_loopback() -> int:
    """Sent so far, by every process of the machine (of the namespace)."""
    line = next(
        line
        for line in Path("/proc/net/dev").read_text().splitlines()
        if line.strip().startswith("lo:")
    )
    return int(line.split(":")[1].split()[8])


def measured(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Median seconds of a step on the slowest process, and bytes per process and step."""
    step()
    seconds, sent = [], bytes_on_loopback_between_steps()
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    sent = bytes_on_loopback_between_steps() - sent
    slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest), sent / steps / dist.get_world_size()


def bytes_on_loopback_between_steps() -> int:
    dist.barrier()
    count = bytes_on_loopback()
    dist.barrier()  # nobody goes on before all have looked
    return count


def zipf_rows(vocabulary: int, tokens: int) -> Tensor:
    """The rows that a batch of this process uses, ascending."""
    torch.manual_seed(dist.get_rank())
    ids = torch.multinomial(1 / torch.arange(1, vocabulary + 1.0), tokens, replacement=True)
    scattered = torch.randperm(
        vocabulary, generator=torch.Generator().manual_seed(7)
    )  # frequent rows lie anywhere
    return scattered[ids].unique()


def bench(vocabulary: int, width: int, tokens: int, steps: int) -> dict[str, Any]:
    """Both ways for one table, on this process."""
    rows = zipf_rows(vocabulary, tokens)
    table = nn.Embedding.from_pretrained(torch.zeros(vocabulary, width), freeze=False)
    averager = RowGradients(
        LazyAdamW(table.parameters(), embeddings=[table]), say=lambda text: None
    )
    values = torch.randn(len(rows), width)

    def sparse() -> None:
        table.weight.grad = torch.sparse_coo_tensor(
            rows[None], values, table.weight.shape, is_coalesced=True, check_invariants=False
        )
        averager.average()

    row_seconds, row_bytes = measured(sparse, steps)
    assert table.weight.grad is not None
    union, mean = len(table.weight.grad.indices()[0]), table.weight.grad.values().double().sum()
    table.weight.grad = None
    dense = torch.zeros(vocabulary, width).index_copy_(0, rows, values)
    dist.all_reduce(dense)
    dense.div_(dist.get_world_size())
    assert torch.isclose(mean, dense.double().sum(), atol=1e-3), "both ways have to give the same"
    dense_seconds, dense_bytes = measured(lambda: dist.all_reduce(dense), steps)
    most = torch.tensor(len(rows))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {
        "processes": dist.get_world_size(),
        "vocabulary": vocabulary,
        "most_rows": int(most),
        "union_rows": union,
        "row_seconds": row_seconds,
        "dense_seconds": dense_seconds,
        "row_bytes": row_bytes,
        "dense_bytes": dense_bytes,
        "row_formula": formula_rows(dist.get_world_size(), int(most), union, vocabulary, width),
        "dense_formula": formula_dense(dist.get_world_size(), vocabulary, width),
    }


def worker(
    rank: int,
    processes: int,
    port: int,
    vocabularies: list[int],
    args: argparse.Namespace,
    results: Any,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes
    )
    for vocabulary in vocabularies:
        result = bench(vocabulary, args.width, args.tokens, args.steps)
        if rank == 0:
            results.put(result)
    dist.destroy_process_group()


def launch(
    processes: int, vocabularies: list[int], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Start so many processes and return what process 0 measured for each vocabulary."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(
        worker, (processes, port, vocabularies, args, results), nprocs=processes
    )
    return [results.get() for _ in vocabularies]


def print_measured(results: list[dict[str, Any]]) -> None:
    print(
        "\nprocesses  vocabulary   rows   union   dense MB (formula)   rows MB (formula)   share   "
        "dense ms  rows ms   share"
    )
    for r in results:
        dense, rows = (
            f"{r[name + '_bytes'] / 1e6:8.2f} ({r[name + '_formula'] / 1e6:7.2f})"
            for name in ("dense", "row")
        )
        shares = (
            f"1/{r['dense_' + what] / r['row_' + what]:<5.0f}" for what in ("bytes", "seconds")
        )
        times = f"{r['dense_seconds'] * 1e3:8.1f} {r['row_seconds'] * 1e3:8.1f}"
        counts = (
            f"{r['processes']:9}  {r['vocabulary']:10,}  {r['most_rows']:5,}  {r['union_rows']:6,}"
        )
        print(f"{counts}   {dense}  {rows}   {next(shares)} {times}   {next(shares)}")


def move_to_own_namespace() -> bool:
    """Start this script again in a namespace in which nobody else uses the loopback device.

    Return True if it is in one, False if there can be none.
    """
    if OWN_NAMESPACE in os.environ:
        return True
    enter = ["unshare", "--user", "--map-root-user", "--net"]
    if (
        shutil.which("ip")
        and shutil.which("unshare")
        and subprocess.run([*enter, "true"], capture_output=True).returncode == 0
    ):
        command = 'ip link set lo up && exec "$@"'
        os.environ |= {
            OWN_NAMESPACE: "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # torch warns that the namespace knows no host names
        os.execvp("unshare", [*enter, "sh", "-c", command, "sh", sys.executable, *sys.argv])
    return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=4096, help="per process and step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--svg", type=Path, help="draw the projection for the largest vocabulary into this file"
    )
    args = parser.parse_args()
    if not move_to_own_namespace():
        print(
            "no network namespace could be made: the bytes are those of everything on this "
            "machine's loopback device"
        )
    vocabularies, counts = QUICK_SIZES if args.quick else (VOCABULARIES, PROCESSES)
    print(
        f"{args.tokens:,} Zipf tokens per process, width {args.width}, float32, gloo over "
        f"loopback, {os.cpu_count()} cores"
    )
    results = [result for processes in counts for result in launch(processes, vocabularies, args)]
    projected = [
        projection(processes, v, args.width, args.tokens)
        for v in vocabularies
        for processes in PROJECTED
    ]
    found = {
        vocabulary: crossings(vocabulary, args.width, args.tokens) for vocabulary in vocabularies
    }
    print_measured(results)
    print_projected(projected, found)
    if args.svg:
        draw(args.svg, vocabularies[-1], results, args.width, args.tokens)
    record = {
        "width": args.width,
        "tokens": args.tokens,
        "measured": results,
        "projected": projected,
        "crossings": found,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
