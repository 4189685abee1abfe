"""The bytes of averaging an embedding's gradient over processes: a formula, and what it says.

A table has V rows of d values of e bytes. Each of P processes used some rows, the
busiest of them k, and all together U <= V. Each process sends (and receives) in one step:

    dense     2 (P-1)/P V d e                a ring all-reduce, or any other optimal in bytes
    counts    8 (P-1)                        how many rows each process used, always first
    ids       4 (P-1) k  or  2 (P-1)/P V     everybody's, padded to k; if P k > 2 V, an
                                             all-reduced mark of a byte for each row
    gather    (P-1) k d e                    the values, padded to k rows, from all to all
    reduce    2 (P-1)/P U d e                a dense all-reduce of the rows that any process used

Rows cost counts + ids + the cheaper of the last two. Every process knows k and U by then, so all
take the same way:

    gather if P k <= 2 U, else reduce

Two processes always gather (k <= U). The more processes, the more their rows overlap, and reduce
takes over. If the union is the whole table, reduce *is* the dense all-reduce. So rows never cost
more than dense by over 4 / (d e) of it, 0.2 % for 640 float32 values, for any number of processes.
SparCML also changes over from sparse to dense: C. Renggli et al., https://arxiv.org/abs/1802.08021.
Ring all-reduce: P. Patarasuk and X. Yuan, https://doi.org/10.1016/j.jpdc.2008.09.002.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.distributed.row_gradients import gathering_is_cheaper, gathering_may_be_cheaper


def formula_dense(processes: int, rows: float, width: int, value_bytes: int = 4) -> float:
    """Return what each process sends to all-reduce `rows`: those of the table, or of the union."""
    return 2 * (processes - 1) / processes * rows * width * value_bytes


def formula_gather(processes: int, most_rows: float, width: int, value_bytes: int = 4) -> float:
    """Return what each process sends if every process gets the values of every other's rows."""
    return (processes - 1) * most_rows * width * value_bytes


def formula_ids(processes: int, most_rows: float, vocabulary: int) -> float:
    """Return what each process sends before any values: counts and ids."""
    counts = 8 * (processes - 1)
    if gathering_may_be_cheaper(processes, most_rows, vocabulary):
        return counts + 4 * (processes - 1) * most_rows
    return counts + formula_dense(processes, vocabulary, width=1, value_bytes=1)


def formula_rows(
    processes: int,
    most_rows: float,
    union_rows: float,
    vocabulary: int,
    width: int,
    value_bytes: int = 4,
) -> float:
    """Return what each process sends if rows are sent, the cheaper way."""
    if gathering_is_cheaper(processes, most_rows, union_rows):
        values = formula_gather(processes, most_rows, width, value_bytes)
    else:
        values = formula_dense(processes, union_rows, width, value_bytes)
    return formula_ids(processes, most_rows, vocabulary) + values


def projection(processes: int, vocabulary: int, width: int, tokens: int) -> dict[str, Any]:
    """Return the formula's bytes with the rows to be expected of Zipf ids."""
    chance = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    chance /= chance.sum()
    most, union = (
        float(-torch.expm1(count * torch.log1p(-chance)).sum())
        for count in (tokens, tokens * processes)
    )
    return {
        "processes": processes,
        "vocabulary": vocabulary,
        "most_rows": round(most),
        "union_rows": round(union),
        "index_bytes": formula_ids(processes, most, vocabulary),
        "gather_bytes": formula_gather(processes, most, width),
        "reduce_bytes": formula_dense(processes, union, width),
        "row_bytes": formula_rows(processes, most, union, vocabulary, width),
        "dense_bytes": formula_dense(processes, vocabulary, width),
    }


def crossing(
    vocabulary: int, width: int, tokens: int, passed: Callable[[dict[str, Any]], bool]
) -> int | None:
    """Return the smallest number of processes, up to 2^20, for which the projection has `passed`.

    It stays so beyond.
    """

    def at(processes: int) -> bool:
        return passed(projection(processes, vocabulary, width, tokens))

    low, high = 1, 2
    while not at(high):
        if high >= 1 << 20:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) else (middle, high)
    return high


def crossings(vocabulary: int, width: int, tokens: int) -> dict[str, int | None]:
    """Return the numbers of processes at which one way becomes cheaper than another."""
    return {
        "reduce_below_gather": crossing(
            vocabulary, width, tokens, lambda p: p["reduce_bytes"] < p["gather_bytes"]
        ),
        "gather_above_dense": crossing(
            vocabulary, width, tokens, lambda p: p["gather_bytes"] > p["dense_bytes"]
        ),
        "rows_above_half_dense": crossing(
            vocabulary, width, tokens, lambda p: p["row_bytes"] > p["dense_bytes"] / 2
        ),
    }


def print_projected(
    projected: list[dict[str, Any]], found: dict[int, dict[str, int | None]]
) -> None:
    """Print the projection, and where one way becomes cheaper than another."""
    print(
        "\nprojected  vocabulary   rows    union    ids MB  gather MB  reduce MB   dense MB   "
        "taken   share of dense"
    )
    for p in projected:
        taken = "gather" if p["gather_bytes"] <= p["reduce_bytes"] else "reduce"
        counts = (
            f"{p['processes']:9,}  {p['vocabulary']:10,}  {p['most_rows']:5,}  {p['union_rows']:7,}"
        )
        sizes = " ".join(
            f"{p[name + '_bytes'] / 1e6:10,.2f}" for name in ("index", "gather", "reduce", "dense")
        )
        print(f"{counts} {sizes}   {taken}   {p['row_bytes'] / p['dense_bytes']:.3f}")
    for vocabulary, at in found.items():
        print(
            f"{vocabulary:,}: reduce takes over from gather at {at['reduce_below_gather']} "
            f"processes (gather alone would pass dense at {at['gather_above_dense']}); rows reach "
            f"half of the dense bytes at {at['rows_above_half_dense']}"
        )


def draw(
    path: Path, vocabulary: int, results: list[dict[str, Any]], width: int, tokens: int
) -> None:
    """Draw megabytes per process and step over the number of processes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    counts = sorted({round(2 ** (i / 4)) for i in range(4, 41)})
    points = [projection(count, vocabulary, width, tokens) for count in counts]
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for key, label, style in (
        ("dense", "dense all-reduce", "-"),
        ("gather", "all-gather of rows", "--"),
        ("reduce", "all-reduce of the union", ":"),
    ):
        axes.plot(counts, [point[key + "_bytes"] / 1e6 for point in points], style, label=label)
    axes.plot(
        counts,
        [point["row_bytes"] / 1e6 for point in points],
        color="black",
        alpha=0.25,
        linewidth=5,
        label="what is done",
    )
    own = [result for result in results if result["vocabulary"] == vocabulary]
    for key, label in (("dense_bytes", "measured, dense"), ("row_bytes", "measured, rows")):
        axes.plot(
            [result["processes"] for result in own],
            [result[key] / 1e6 for result in own],
            "o",
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel="processes", ylabel="MB sent per process and step")
    axes.set_title(
        f"{vocabulary:,} x {width} float32, {tokens:,} Zipf tokens per process",
        fontsize=10,
    )
    axes.set_xticks([2, 8, 64, 1024], ["2", "8", "64", "1,024"])
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight")
