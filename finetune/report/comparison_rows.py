"""The drawings of a comparison that have a row for each optimizer: test loss, steps to the target, state.

Floor 1.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from finetune.comparison.frequency import BINS
from finetune.report.series import Picture, look, picture
from finetune.report.svg import INK, tick

Record = dict[str, Any]


def test_losses(comparison: Record) -> Picture:
    """The test loss with its interval: over all tokens, and by how frequent the token is; the best on top."""
    rows, bins = comparison["optimizers"], comparison["bins"]
    ranking = comparison["verdict"]["ranking"]
    order = [*ranking, *(name for name in rows if name not in ranking)]
    numbers = {name: number for number, name in enumerate(rows)}
    titles = {"all": "all tokens"} | {
        name: f"{name}: {bins[name]['tokens']:,} tokens"
        for name in BINS
        if bins and bins[name]["targets"]
    }

    def fill(figure: Figure) -> None:
        for axes, (panel, title) in zip(
            figure.subplots(1, len(titles), sharey=True, squeeze=False)[0], titles.items()
        ):
            axes.set_title(title, fontsize=11, color=INK, loc="left")
            for place, name in enumerate(order):
                _dot(axes, _of(rows[name], panel), place, numbers[name])
            _rows(axes, order, "")
            axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))

    said = []
    for name in order:
        means = {panel: (_of(rows[name], panel) or {}).get("mean") for panel in titles}
        said.append(
            f"{name}: "
            + ", ".join(
                f"{panel} {'diverged' if m is None else f'{m:.3f}'}" for panel, m in means.items()
            )
            + "."
        )
    svg = picture("test", (920, 80 + 26 * len(order)), "Test loss. " + " ".join(said), fill)
    return Picture(
        "Test loss",
        "nats per target token, mean and 95 % interval, by how frequent the token is in training",
        svg,
        "wide",
    )


def steps_to_target(comparison: Record) -> Picture:
    """A dot for each seed; misses stand at the right edge, with their number."""
    names, steps = list(comparison["optimizers"]), comparison["protocol"]["steps"]
    reported = [run for run in comparison["runs"] if run["phase"] == "reported"]

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for place, name in enumerate(names):
            found = [run["steps_to_target"] for run in reported if run["optimizer"] == name]
            reached = sorted(step for step in found if step is not None)
            heights = [
                place + 0.11 * (index - (len(reached) - 1) / 2) for index in range(len(reached))
            ]
            colour, marker = look(place).colour, look(place).marker
            axes.plot(reached, heights, color=colour, marker=marker, markersize=6, linestyle="none")
            if missed := len(found) - len(reached):
                axes.plot(
                    [steps * 1.1],
                    [place],
                    color=colour,
                    marker="x",
                    markersize=8,
                    markeredgewidth=2,
                )
                _beside(axes, f"{missed}", steps * 1.1, place)
        _rows(axes, names, "steps")
        axes.set_xlim(0, steps * 1.2)

    said = []
    for name, row in comparison["optimizers"].items():
        found = row["to_target"]
        median = "missed" if found["steps"] is None else f"{found['steps']:g} steps"
        said.append(
            f"{name}: median {median}, reached by {found['reached']} of {row['reported_runs']}."
        )
    svg = picture(
        "to-target", (440, 70 + 28 * len(names)), "Steps to the target. " + " ".join(said), fill
    )
    unit = f"to a held-out loss of {comparison['target']['loss']:.3f}; a dot a seed; ×: so many missed it"
    return Picture("Steps to target", unit, svg, "half")


def state(rows: Record) -> Picture:
    """What the optimizer keeps beside the weights."""
    names, sizes = list(rows), [row["state_bytes"] / 2**20 for row in rows.values()]

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(
            range(len(names)),
            sizes,
            color=[look(number).colour for number in range(len(names))],
            height=0.55,
        )
        for place, size in enumerate(sizes):
            _beside(axes, f"{size:,.3g}", size, place)
        _rows(axes, names, "MiB")
        axes.set_xlim(0, max(sizes) * 1.18 or 1)

    said = " ".join(f"{name}: {size:,.3g} MiB." for name, size in zip(names, sizes))
    svg = picture("state", (440, 70 + 28 * len(names)), f"Optimizer state. {said}", fill)
    return Picture("Optimizer state", "MiB after the last step, measured", svg, "half")


def _of(row: Record, panel: str) -> Record | None:
    return row["test"] if panel == "all" else (row["test_by_frequency"] or {}).get(panel)


def _dot(axes: Axes, value: Record | None, place: int, number: int) -> None:
    if value is None:
        axes.annotate(
            "diverged",
            (0.03, place),
            xycoords=("axes fraction", "data"),
            color=INK,
            va="center",
            fontsize=10,
        )
        return
    colour = look(number).colour
    if value["low"] is not None:
        axes.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=2)
    axes.plot([value["mean"]], [place], color=colour, marker=look(number).marker, markersize=7)


def _beside(axes: Axes, text: str, along: float, place: int) -> None:
    axes.annotate(
        text,
        (along, place),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=INK,
        fontsize=10,
    )


def _rows(axes: Axes, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_axisbelow(True)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_xlabel(label)
