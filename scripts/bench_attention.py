"""Attention on a CPU: torch's fused kernel against products, over the same examples.

    python scripts/bench_attention.py [--threads 2] [--dtype float32|bfloat16]

Forward and backward of one layer with the heads of SmolLM2-135M (9 of queries, 3 of keys, width
64). The two take turns; the time is the median of the rounds, and the spread is that of the ratios
within a round. Then one JSON line.
"""

import argparse
import json
import random
import statistics
import time

import torch

from finetune.compute import attention
from finetune.compute.layout import plan_layout

HEADS, SHARED, WIDTH = 9, 3, 64


def shapes() -> dict[str, list[int]]:
    """Return the lengths of the examples in a micro-batch, by name."""
    chance = random.Random(0)
    return {
        "10 x 96": [96] * 10,
        "4 x 256": [256] * 4,
        "2 x 512": [512] * 2,
        "16 x 64": [64] * 16,
        "24 of 40 to 130": [chance.randint(40, 130) for _ in range(24)],
        "7 of 60 to 500": [chance.randint(60, 500) for _ in range(7)],
    }


def seconds(lengths: list[int], dtype: torch.dtype, *, fused: bool) -> float:
    """Return the time of a forward and a backward pass."""
    attention.FUSED = (dtype,) if fused else ()
    layout = plan_layout(lengths, HEADS, few_shapes=not fused)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), WIDTH, dtype=dtype, requires_grad=True)
        for heads in (HEADS, SHARED, SHARED)
    )
    started = time.perf_counter()
    output = attention.attend(query, key, value, layout, scale=None, dropout=0.0)
    output.backward(torch.ones_like(output))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype, found = getattr(torch, options.dtype), {}
    print(f"{'examples':18}{'products ms':>12}{'fused ms':>10}{'ratio':>7}  spread")
    for name, lengths in shapes().items():
        rounds = [
            [seconds(lengths, dtype, fused=fused) for fused in (False, True)]
            for _ in range(options.rounds + 1)
        ][1:]
        products, fused = (1000 * statistics.median(times) for times in zip(*rounds, strict=True))
        ratios = sorted(ours / theirs for ours, theirs in rounds)
        found[name] = {"products_ms": products, "fused_ms": fused, "ratios": ratios}
        print(
            f"{name:18}{products:12.1f}{fused:10.1f}{products / fused:7.2f}"
            f"  {ratios[0]:.2f} to {ratios[-1]:.2f}",
            flush=True,
        )
    print(json.dumps({"dtype": options.dtype, "threads": options.threads, "shapes": found}))


if __name__ == "__main__":
    main()
