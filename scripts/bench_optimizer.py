"""What an optimizer step over an embedding costs: dense AdamW, SparseAdam and LazyAdamW, one beside the other.

    python scripts/bench_optimizer.py            every shape (several GB of memory)
    python scripts/bench_optimizer.py --quick    the shapes that the README speaks of
    python scripts/bench_optimizer.py --end-to-end TEXT_FILE    whole training steps of an untied model on real text

All optimizers of one shape take turns, step by step, on the same gradients, so that a busy machine slows them alike.  The table
is in steady state: Zipf ids, rows left for as long as Zipf leaves them, cosine learning rate, decay on.  A dense optimizer is
charged for the dense gradient that it needs (zeroed and filled).  The floor is the traffic of reading gradient, parameter and two
moments of the touched rows and writing the last three, at the bandwidth of a copy on the same machine.  "LazyAdamW" does all of it
in the step; "in training" the lookup of the forward, timed below it, has brought the rows up to date already (a CPU keeps them).
The last line is JSON.
"""

import argparse
import json
import math
import multiprocessing
import re
import resource
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.optim import LazyAdamW
from finetune.optim.lazy.state import RowState

STEP = 3000  # of the steady state that is set up
SHAPES = [
    (v << 10, d, k) for v in (32, 128, 256) for d in (512, 640, 1024) for k in (256, 2048, 16384)
]
QUICK = [(128 << 10, 640, 2048), (256 << 10, 640, 2048)]


def copy_bandwidth() -> float:
    """Bytes a second read and written by copying 256 MiB."""
    source, target = torch.ones(1 << 26), torch.ones(1 << 26)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(7))


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def lr_at(step: int) -> float:
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (2 * STEP))))


class Shape:
    """Optimizers over one table [vocabulary, width]; they share the memory of the weight, whose values do not matter here."""

    def __init__(self, vocabulary: int, width: int, touched: int, names: list[str]) -> None:
        self.touched = touched
        weight = torch.randn(vocabulary, width) * 0.02
        self.dense_grad = (
            torch.zeros_like(weight) if any("AdamW(" in name for name in names) else None
        )
        self.frequency = 1 / torch.arange(1, vocabulary + 1.0)
        self.optimizers, self.weights, self.module = {}, {}, None
        for name in names:
            module = nn.Embedding(vocabulary, width, _weight=weight)
            options = {"lr": lr_at(STEP)}
            match name:
                case "AdamW(fused)":
                    optimizer = torch.optim.AdamW(
                        module.parameters(), weight_decay=0.1, fused=True, **options
                    )
                case "AdamW(foreach)":
                    optimizer = torch.optim.AdamW(
                        module.parameters(), weight_decay=0.1, foreach=True, **options
                    )
                case "SparseAdam":
                    optimizer = torch.optim.SparseAdam(module.parameters(), **options)
                case _:
                    optimizer = LazyAdamW(
                        module.parameters(), weight_decay=0.1, embeddings=[module], **options
                    )
                    self.module = module
                    self._enter_steady_state(module)
            self.optimizers[name], self.weights[name] = optimizer, module.weight

    def _enter_steady_state(self, module: nn.Embedding) -> None:
        """Give the lazy table the history that it would have after STEP steps of such batches."""
        chance = -torch.expm1(self.touched * torch.log1p(-self.frequency / self.frequency.sum()))
        gap = torch.empty_like(chance).exponential_().div_(-torch.log1p(-chance)).long()
        rows = (gap < STEP).nonzero()[:, 0]
        rates = [lr_at(step) for step in range(STEP)]
        table = module.row_table
        moments = [torch.randn(len(rows), module.embedding_dim).mul_(1e-4)]
        moments.append(torch.full_like(moments[0], 1e-8))
        history = {
            "lr": torch.tensor(rates, dtype=torch.float64),
            "weight_decay": torch.full((STEP,), 0.1, dtype=torch.float64),
        }
        now = RowState.up_to_date(
            STEP, rows, *moments, betas=table.history.betas, eps=table.history.eps
        )
        table.start(module.weight, now._replace(last_step=STEP - gap[rows], **history))
        table.rules.grow()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Distinct Zipf rows, ascending, with gradients."""
        rows = torch.multinomial(self.frequency, self.touched).sort().values
        return rows, torch.randn(self.touched, self.weights_shape[1]) * 1e-3

    @property
    def weights_shape(self) -> torch.Size:
        return next(iter(self.weights.values())).shape

    def step(self, name: str, rows: Tensor, values: Tensor, lr: float) -> float:
        """Seconds of one step, with the dense gradient where one is needed."""
        weight, optimizer = self.weights[name], self.optimizers[name]
        optimizer.param_groups[0]["lr"] = lr
        if "AdamW(" in name:
            weight.grad = self.dense_grad

            def run() -> None:
                weight.grad.zero_()
                weight.grad.index_copy_(0, rows, values)
                optimizer.step()
        else:
            weight.grad = torch.sparse_coo_tensor(
                rows[None], values, weight.shape, is_coalesced=True, check_invariants=False
            )
            run = optimizer.step
        return timed(run)

    def state_bytes(self, name: str) -> int:
        if name == "LazyAdamW":
            table = self.module.row_table
            state = table.stored_state()
            moments = [state.exp_avg, state.exp_avg_sq]
            kept = [state.rows, state.last_step, *moments, table.slot_of_row]
        else:
            kept = [
                value
                for state in self.optimizers[name].state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ]
        return sum(value.nbytes for value in kept)


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_ms": 1e3 * statistics.median(ordered),
        "low_ms": 1e3 * ordered[len(ordered) // 10],
        "high_ms": 1e3 * ordered[-1 - len(ordered) // 10],
    }


def bench_steps(shapes: list[tuple[int, int, int]], names: list[str], repeats: int) -> dict:
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    print(
        f"{'table':>14}{'rows':>7}  {'optimizer':<22}{'ms a step':>9}{'(10-90 %)':>19}{'x fused':>8}{'x floor':>8}{'state MB':>10}"
    )
    results = []
    for vocabulary, width, touched in shapes:
        shape = Shape(vocabulary, width, touched, names)
        floor = 7 * touched * width * 4 / bandwidth
        seconds: dict[str, list[float]] = {name: [] for name in names}
        after_lookup, lookups = "LazyAdamW in training", []
        if shape.module is not None:
            seconds[after_lookup] = []
        for turn in range(repeats + 2):
            lr, (rows, values) = lr_at(STEP + turn), shape.batch()
            for name in names:
                if name != "AdamW(foreach)" or turn <= 4:
                    seconds[name].append(shape.step(name, rows, values, lr))
            if (
                shape.module is not None
            ):  # as in training: the forward looks the rows up, much else happens, the step comes
                table, weight = shape.module.row_table, shape.module.weight.detach()
                rows, values = shape.batch()
                lookups.append(
                    timed(
                        lambda table=table, weight=weight, rows=rows: table.read(
                            weight, rows, step_follows=True
                        )
                    )
                )
                shape.step(names[0], rows, values, lr)
                seconds[after_lookup].append(shape.step("LazyAdamW", rows, values, lr))
        entry = {
            "vocabulary": vocabulary,
            "width": width,
            "touched": touched,
            "floor_ms": 1e3 * floor,
            "optimizers": {},
        }
        for name in seconds:
            found = {
                **summary(seconds[name][2:]),
                "state_bytes": shape.state_bytes("LazyAdamW" if name == after_lookup else name),
            }
            entry["optimizers"][name] = found
            fused = (
                summary(seconds["AdamW(fused)"][2:])["median_ms"]
                if "AdamW(fused)" in names
                else math.nan
            )
            ratio = fused / found["median_ms"]
            print(
                f"{vocabulary >> 10:>8}k x {width:<4}{touched:>6}  {name:<22}{found['median_ms']:>9.1f} "
                f"{found['low_ms']:>9.1f}-{found['high_ms']:<8.1f}{ratio:>8.1f} {found['median_ms'] / (1e3 * floor):>8.1f} "
                f"{found['state_bytes'] / 1e6:>9.1f}"
            )
        if lookups:
            entry["lookup"] = summary(lookups[2:])
            print(f"{'':>21}  {'its lookup':<22}{entry['lookup']['median_ms']:>9.1f}")
        results.append(entry)
    return {
        "bandwidth_bytes_per_second": bandwidth,
        "threads": torch.get_num_threads(),
        "steps": results,
    }


def text_ids(path: Path, vocabulary: int) -> Tensor:
    """Words and marks of a text, numbered by how often they occur: Zipf's law as it is, without a tokenizer."""
    words = re.findall(r"\w+|[^\w\s]", path.read_text(encoding="utf-8"))
    count: dict[str, int] = {}
    for word in words:
        count[word] = count.get(word, 0) + 1
    number = {word: i for i, word in enumerate(sorted(count, key=count.__getitem__, reverse=True))}
    return torch.tensor([min(number[word], vocabulary - 1) for word in words])


def training(kind: str, ids: Tensor, batch: tuple[int, int]):
    """Yield the seconds of whole training steps of an untied model of Pythia-70m's shape."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            intermediate_size=2048,
        )
    )
    if kind == "LazyAdamW":
        optimizer = LazyAdamW(
            model.parameters(), lr=1e-4, embeddings=[model.get_input_embeddings()]
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = batch[0] * batch[1]
    while True:
        for chunk in ids[: len(ids) // size * size].split(size):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = model(input_ids=chunk.view(batch), labels=chunk.view(batch)).loss
            loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            yield time.perf_counter() - start, time.perf_counter() - middle, loss.item()


def peak_memory(kind: str, ids: Tensor, batch: tuple[int, int], steps: int) -> int:
    """Bytes resident at most, of a process of its own that takes `steps` steps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (kind, ids, batch, steps, torch.get_num_threads()))


def _peak_memory(kind: str, ids: Tensor, batch: tuple[int, int], steps: int, threads: int) -> int:
    torch.set_num_threads(threads)
    run = training(kind, ids, batch)
    for _ in range(steps):
        next(run)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_training(path: Path, batch: tuple[int, int], steps: int) -> dict:
    ids = text_ids(path, 50304)
    kinds = ["AdamW(fused)", "LazyAdamW"]
    runs = {kind: training(kind, ids, batch) for kind in kinds}
    taken: dict[str, list] = {kind: [] for kind in kinds}
    for _ in range(steps + 2):
        for kind in kinds:
            taken[kind].append(next(runs[kind]))
    runs.clear()
    results = {}
    for kind in kinds:
        whole, optimizer = ([step[i] for step in taken[kind][2:]] for i in (0, 1))
        found = {
            "whole": summary(whole),
            "optimizer": summary(optimizer),
            "peak_bytes": peak_memory(kind, ids, batch, 4),
        }
        found["losses"] = [step[2] for step in taken[kind]]
        results[kind] = found
        print(
            f"{kind:<14} whole step {found['whole']['median_ms']:8.0f} ms "
            f"({found['whole']['low_ms']:.0f}-{found['whole']['high_ms']:.0f}), "
            f"optimizer {found['optimizer']['median_ms']:6.0f} ms, peak memory {found['peak_bytes'] / 1e6:6.0f} MB, "
            f"last loss {found['losses'][-1]:.6f}"
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two shapes, few repeats")
    parser.add_argument(
        "--end-to-end",
        type=Path,
        metavar="TEXT_FILE",
        help="time whole training steps on this text instead",
    )
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("ROWS", "TOKENS"))
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=["AdamW(fused)", "AdamW(foreach)", "SparseAdam", "LazyAdamW"],
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.end_to_end:
        results = bench_training(
            arguments.end_to_end, tuple(arguments.batch), arguments.repeats or 6
        )
    else:
        results = bench_steps(
            QUICK if arguments.quick else SHAPES, arguments.optimizers, arguments.repeats or 15
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
