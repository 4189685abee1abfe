"""What an optimizer step over an embedding costs: dense AdamW, SparseAdam and LazyAdamW.

    python scripts/bench_optimizer.py            every table (several GB of memory)
    python scripts/bench_optimizer.py --quick    two tables of 640 columns
    python scripts/bench_optimizer.py --end-to-end TEXT_FILE
                                                 whole steps of an untied model on real text

All optimizers of one table take turns, step by step, on the same gradients, so that a busy machine
slows them alike. The table is in steady state: Zipf ids, rows unused for as long as Zipf leaves
them unused, cosine learning rate, weight decay. A dense optimizer is charged for the dense gradient
that it needs (zeroed and filled).

The floor is the memory traffic of the touched rows, at the bandwidth of a copy on the same machine:
gradient, parameter and two moments are read, and the last three are written. "LazyAdamW" does all
its work in the step. "in training" the lookup of the forward has brought the rows up to date
already (a CPU keeps them); its time is below. The last line is JSON.
"""

import argparse
import json
import math
import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.optim import LazyAdamW
from finetune.optim.lazy.state import RowState

STEP = 3000  # of the steady state that is set up
TABLES = [  # vocabulary, width, rows that a step touches
    (v << 10, d, k) for v in (32, 128, 256) for d in (512, 640, 1024) for k in (256, 2048, 16384)
]
QUICK_TABLES = [(128 << 10, 640, 2048), (256 << 10, 640, 2048)]


def copy_bandwidth() -> float:
    """Return the bytes per second that copying 256 MiB reads and writes."""
    source, target = torch.ones(1 << 26), torch.ones(1 << 26)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(7))


def seconds_of(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def lr_at(step: int) -> float:
    """Return the learning rate of a step, on half a cosine over twice STEP steps."""
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (2 * STEP))))


class Contest:
    """Optimizers over one table [vocabulary, width].

    All but the lazy one share the memory of the weight, whose values do not matter here. The lazy
    one would notice that others write there.
    """

    def __init__(self, vocabulary: int, width: int, touched: int, names: list[str]) -> None:
        self.touched = touched
        weight = torch.randn(vocabulary, width) * 0.02
        self.dense_grad = (
            torch.zeros_like(weight) if any("AdamW(" in name for name in names) else None
        )
        self.frequency = 1 / torch.arange(1, vocabulary + 1.0)
        self.optimizers, self.weights, self.module = {}, {}, None
        for name in names:
            own = weight.clone() if name == "LazyAdamW" else weight
            module = nn.Embedding(vocabulary, width, _weight=own)
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
        """Give the lazy table the history of STEP steps of such batches."""
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
        """Return distinct Zipf rows, ascending, and their gradients."""
        rows = torch.multinomial(self.frequency, self.touched).sort().values
        return rows, torch.randn(self.touched, self.weights_shape[1]) * 1e-3

    @property
    def weights_shape(self) -> torch.Size:
        return next(iter(self.weights.values())).shape

    def step(self, name: str, rows: Tensor, values: Tensor, lr: float) -> float:
        """Return the seconds of one step, with the dense gradient if the optimizer needs one."""
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
        return seconds_of(run)

    def look_up(self, rows: Tensor) -> float:
        """Return the seconds of the lazy table's lookup in a forward."""
        return seconds_of(lambda: self.module(rows))

    def state_bytes(self, name: str) -> int:
        """Return the bytes of an optimizer's state."""
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
    """Return the median and the range from the 10th to the 90th percentile, in ms."""
    ordered = sorted(seconds)
    return {
        "median_ms": 1e3 * statistics.median(ordered),
        "low_ms": 1e3 * ordered[len(ordered) // 10],
        "high_ms": 1e3 * ordered[-1 - len(ordered) // 10],
    }


IN_TRAINING = "LazyAdamW in training"


def bench_steps(tables: list[tuple[int, int, int]], names: list[str], repeats: int) -> dict:
    """Time single steps over every table, and print a line for each optimizer."""
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    print(
        f"{'table':>14}{'rows':>7}  {'optimizer':<22}{'ms a step':>9}{'(10-90 %)':>19}"
        f"{'x fused':>8}{'x floor':>8}{'state MB':>10}"
    )
    results = []
    for vocabulary, width, touched in tables:
        contest = Contest(vocabulary, width, touched, names)
        seconds, lookups = take_turns(contest, names, repeats)
        floor = 1e3 * 7 * touched * width * 4 / bandwidth
        entry = {"vocabulary": vocabulary, "width": width, "touched": touched, "floor_ms": floor}
        entry["optimizers"] = {
            name: summary(taken[2:])
            | {"state_bytes": contest.state_bytes("LazyAdamW" if name == IN_TRAINING else name)}
            for name, taken in seconds.items()
        }
        for name, found in entry["optimizers"].items():
            fused = entry["optimizers"].get("AdamW(fused)", {"median_ms": math.nan})["median_ms"]
            print(
                f"{vocabulary >> 10:>8}k x {width:<4}{touched:>6}  {name:<22}"
                f"{found['median_ms']:>9.1f} {found['low_ms']:>9.1f}-{found['high_ms']:<8.1f}"
                f"{fused / found['median_ms']:>8.1f} {found['median_ms'] / floor:>8.1f} "
                f"{found['state_bytes'] / 1e6:>9.1f}"
            )
        if lookups:
            entry["lookup"] = summary(lookups[2:])
            print(f"{'':>21}  {'its lookup':<22}{entry['lookup']['median_ms']:>9.1f}")
        results.append(entry)
    threads = torch.get_num_threads()
    return {"bandwidth_bytes_per_second": bandwidth, "threads": threads, "steps": results}


def take_turns(
    contest: Contest, names: list[str], repeats: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Return the seconds of each optimizer's steps, and those of the lazy table's lookups."""
    lazy = contest.module is not None
    seconds: dict[str, list[float]] = {name: [] for name in [*names, *[IN_TRAINING] * lazy]}
    lookups = []
    for turn in range(repeats + 2):
        lr, (rows, values) = lr_at(STEP + turn), contest.batch()
        for name in names:
            if name != "AdamW(foreach)" or turn <= 4:
                seconds[name].append(contest.step(name, rows, values, lr))
        if lazy:  # as in training: the forward looks the rows up, and the step comes much later
            rows, values = contest.batch()
            lookups.append(contest.look_up(rows))
            contest.step(names[0], rows, values, lr)
            seconds[IN_TRAINING].append(contest.step("LazyAdamW", rows, values, lr))
    return seconds, lookups


def text_ids(path: Path, vocabulary: int) -> Tensor:
    """Return the words and marks of a text as numbers, the most frequent first.

    So Zipf's law is as in the text, without a tokenizer.
    """
    words = re.findall(r"\w+|[^\w\s]", path.read_text(encoding="utf-8"))
    count: dict[str, int] = {}
    for word in words:
        count[word] = count.get(word, 0) + 1
    number = {word: i for i, word in enumerate(sorted(count, key=count.__getitem__, reverse=True))}
    return torch.tensor([min(number[word], vocabulary - 1) for word in words])


def training(
    kind: str, ids: Tensor, batch: tuple[int, int]
) -> Iterator[tuple[float, float, float]]:
    """Yield the seconds of whole steps, those of the optimizer in them, and the losses.

    The model is untied, of Pythia-70m's shape. `batch`: sequences, and tokens of each.
    """
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


def memory_of_training(kind: str, ids: Tensor, batch: tuple[int, int], steps: int) -> int:
    """Return the most bytes resident in a process of its own that takes `steps` steps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory_of_training, (kind, ids, batch, steps, torch.get_num_threads()))


def _memory_of_training(
    kind: str, ids: Tensor, batch: tuple[int, int], steps: int, threads: int
) -> int:
    torch.set_num_threads(threads)
    run = training(kind, ids, batch)
    for _ in range(steps):
        next(run)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_training(path: Path, batch: tuple[int, int], steps: int) -> dict:
    """Time whole steps on a text, with fused AdamW and with LazyAdamW in turn."""
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
            "peak_bytes": memory_of_training(kind, ids, batch, 4),
        }
        found["losses"] = [step[2] for step in taken[kind]]
        results[kind] = found
        print(
            f"{kind:<14} whole step {found['whole']['median_ms']:8.0f} ms "
            f"({found['whole']['low_ms']:.0f}-{found['whole']['high_ms']:.0f}), "
            f"optimizer {found['optimizer']['median_ms']:6.0f} ms, "
            f"peak memory {found['peak_bytes'] / 1e6:6.0f} MB, "
            f"last loss {found['losses'][-1]:.6f}"
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two tables only")
    parser.add_argument(
        "--table", type=int, nargs=3, action="append", metavar=("ROWS", "COLUMNS", "USED"),
        help="a table instead of those, and how many rows a step uses; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--end-to-end",
        type=Path,
        metavar="TEXT_FILE",
        help="time whole training steps on this text instead",
    )
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument(
        "--batch", type=int, nargs=2, default=(4, 128), metavar=("SEQUENCES", "TOKENS")
    )
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
            arguments.table or (QUICK_TABLES if arguments.quick else TABLES),
            arguments.optimizers,
            arguments.repeats or 15,
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
