"""What the output head and its loss cost, forward and backward, against other ways to compute them.

    python scripts/bench_loss.py                    SmolLM2's and Gemma-3-270M's heads, 512 targets
    python scripts/bench_loss.py --tokens 8192      for a GPU
    python scripts/bench_loss.py --heads 49152x576 --softcap 30

`full`: all rows of the table train. `active`: `--active` of them train, and the others take part
frozen. `sampled`: these and a sample of `--sampled` of the others. `plain` multiplies all rows and
calls torch's cross-entropy. `torch` is torch's linear_cross_entropy, if torch has it; it has no
soft cap. `liger` is Liger's fused loss, if liger-kernel is installed and there is a GPU, with the
gradient summed in float32 as ours is. Products are in bf16 under autocast if the machine has them.

Each round takes every way in turn. Milliseconds: median (least-most) over the rounds after two. GB:
the most that was allocated in a round, on a GPU. The last line is JSON, with the loss, which is the
same for every way but `sampled`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

from finetune.compute.loss import FrozenRows, linear_cross_entropy
from finetune.models.speed import resolve_precision

# of hidden states [N, d], table [V, d] and targets [N]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
WARMUP_ROUNDS = 2
WAYS = ("full", "active", "sampled", "plain", "torch", "liger")


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return the logits after the soft cap, if there is one."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def ways(
    args: argparse.Namespace, table: Tensor, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Loss]]:
    """Return the rows that train and the loss, for each way.

    `dtype`: that of the products, in which training keeps the frozen rows.
    """
    softcap = args.softcap
    rest = table[args.active :].detach().to(dtype)
    offset = torch.zeros(args.active + args.sampled, device=table.device)
    offset[args.active :] = math.log(len(rest) / args.sampled)
    frozen, sample = FrozenRows(rest), FrozenRows(rest[: args.sampled].clone(), offset)
    active = table[: args.active].detach().clone().requires_grad_()

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            capped((hidden @ weight.t()).float(), softcap), targets, reduction="sum"
        )

    found: dict[str, tuple[Tensor, Loss]] = {
        "full": (table, lambda h, w, t: linear_cross_entropy(h, w, t, softcap=softcap)),
        "active": (
            active,
            lambda h, w, t: linear_cross_entropy(h, w, t, frozen=frozen, softcap=softcap),
        ),
        "sampled": (
            active,
            lambda h, w, t: linear_cross_entropy(h, w, t, frozen=sample, softcap=softcap),
        ),
        "plain": (table, plain),
    }
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is not None and softcap is None:
        found["torch"] = (table, lambda h, w, t: theirs(h, w, t, reduction="sum"))
    if table.is_cuda:
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            return found
        liger = LigerFusedLinearCrossEntropyLoss(
            reduction="sum", softcap=softcap, accum_dtype=torch.float32
        )
        found["liger"] = (table, lambda h, w, t: liger(w, h, t))
    return found


def measure(args: argparse.Namespace, rows: int, width: int) -> dict[str, Any]:
    """Return milliseconds, memory and loss of every way for one head."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = resolve_precision("auto", device)[0] == "bf16"
    torch.manual_seed(0)
    table = (torch.randn(rows, width, device=device) * 0.05).requires_grad_()
    dtype = torch.bfloat16 if half else torch.float32
    hidden = torch.randn(args.tokens, width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(args.active, (args.tokens,), device=device)
    contestants = {name: way for name, way in ways(args, table, dtype).items() if name in args.ways}
    milliseconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks, losses = dict.fromkeys(contestants, 0.0), dict.fromkeys(contestants, 0.0)
    for _ in range(args.rounds + WARMUP_ROUNDS):
        for name, (weight, loss) in contestants.items():
            hidden.grad = weight.grad = None
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                total = loss(hidden, weight, targets)
            total.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e9
            milliseconds[name].append((time.perf_counter() - started) * 1e3)
            losses[name] = total.item() / args.tokens
    measured = {
        name: {
            "ms": spread(times[WARMUP_ROUNDS:]),
            "gb": round(peaks[name], 3),
            "loss": losses[name],
        }
        for name, times in milliseconds.items()
    }
    return {"rows": rows, "width": width, "ways": measured}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--heads", nargs="+", default=["49152x576", "262144x640"], help="rows x width of the table"
    )
    parser.add_argument("--tokens", type=int, default=512, help="target tokens")
    parser.add_argument(
        "--active", type=int, default=8192, help="rows that train, for active and sampled"
    )
    parser.add_argument("--sampled", type=int, default=4096, help="frozen rows of the sample")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if any(int(head.split("x")[0]) < args.active + args.sampled for head in args.heads):
        parser.error(
            f"a head needs at least {args.active} + {args.sampled} rows. "
            "Lower --active or --sampled"
        )
    heads = [measure(args, *map(int, head.split("x"))) for head in args.heads]
    for head in heads:
        drawn = Table(title=f"{head['rows']:,} x {head['width']}, {args.tokens:,} tokens")
        for column in ("", "ms", "GB"):
            drawn.add_column(column, justify="right")
        for name, found in head["ways"].items():
            median, least, most = found["ms"]
            drawn.add_row(
                name,
                f"{median:.1f} ({least:.1f}-{most:.1f})",
                f"{found['gb']:.2f}" if found["gb"] else "",
            )
        Console().print(drawn)
    print(
        json.dumps(
            {"tokens": args.tokens, "active": args.active, "softcap": args.softcap, "heads": heads}
        )
    )


if __name__ == "__main__":
    main()
