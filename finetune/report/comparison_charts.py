"""The drawings of a comparison: curves here, rows in `comparison_rows.py`. Each has a text alternative with its numbers.

Floor 1.
"""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from finetune.report.comparison_rows import state, steps_to_target, test_losses
from finetune.report.series import Picture, line, look, picture
from finetune.report.svg import INK, tick

Record = dict[str, Any]

COSTS = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training"}
MARKS = 12  # markers on a line, about


def pictures_of(comparison: Record) -> list[Picture]:
    """All drawings, in the order of the page."""
    rows = comparison["optimizers"]
    target = comparison["target"]["loss"]
    found = [
        test_losses(comparison),
        *(_learning(rows, key, target) for key in COSTS),
        _learning_rates(comparison),
        _updates(rows),
    ]
    return [*found, *([steps_to_target(comparison)] if target is not None else []), state(rows)]


def legend(names: Sequence[str]) -> str:
    """A strip that says which line and marker is which optimizer."""

    def fill(figure: Figure) -> None:
        handles = [Line2D([], [], label=name, **line(number)) for number, name in enumerate(names)]
        figure.legend(
            handles=handles,
            loc="center left",
            ncols=7,
            handlelength=3.6,
            borderaxespad=0,
            columnspacing=1.8,
        )

    return picture(
        "legend", (920, 26 * math.ceil(len(names) / 7)), "Legend: " + ", ".join(names) + ".", fill
    )


def _learning(rows: Record, key: str, target: float | None) -> Picture:
    """The mean held-out loss, with a band from the lowest to the highest seed."""

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, row in enumerate(rows.values()):
            curve, colour = row["curve"], look(number).colour
            along = [point[key] for point in curve]
            low, high = [point["lowest"] for point in curve], [point["highest"] for point in curve]
            axes.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                along,
                [point["loss"] for point in curve],
                markevery=max(1, len(curve) // MARKS),
                **line(number),
            )
            if row["reported_diverged"] and curve:
                axes.plot(
                    along[-1],
                    curve[-1]["loss"],
                    color=colour,
                    marker="x",
                    markersize=9,
                    markeredgewidth=2,
                )
        if target is not None:
            axes.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
            place: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "ha": "left",
                "va": "bottom",
            }
            axes.annotate("target", (0.015, target), color=INK, fontsize=10, **place)
        _finish(axes, COSTS[key])

    said = [
        f"{name}: {row['curve'][0]['loss']:.3f} at first, {row['curve'][-1]['loss']:.3f} at the end."
        for name, row in rows.items()
        if row["curve"]
    ]
    title = f"Held-out loss against {COSTS[key].split()[0]}"
    svg = picture(f"by-{key}", (330, 260), f"{title}. " + " ".join(said), fill)
    return Picture(title, "mean and range over seeds", svg, "third")


def _learning_rates(comparison: Record) -> Picture:
    """Held-out loss against learning rate; what diverged, or ended above where it began, stands at the upper edge."""
    rows = comparison["optimizers"]
    trials = {name: _trials(comparison, name) for name in rows}
    untrained = max(
        (row["curve"][0]["loss"] for row in rows.values() if row["curve"]), default=math.inf
    )
    shown = [loss for found in trials.values() for _, loss in found if loss <= untrained] or [
        0.0,
        1.0,
    ]
    space = 0.08 * (max(shown) - min(shown) or 1.0)
    edge = max(shown) + 2 * space

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        ring: dict[str, Any] = {
            "marker": "o",
            "markersize": 14,
            "markerfacecolor": "none",
            "linestyle": "none",
        }
        for number, (name, found) in enumerate(trials.items()):
            colour = look(number).colour
            good = [(lr, loss) for lr, loss in found if loss <= untrained]
            axes.plot([lr for lr, _ in good], [loss for _, loss in good], **line(number))
            bad = [lr for lr, loss in found if not loss <= untrained]
            axes.plot(
                bad,
                [edge] * len(bad),
                color=colour,
                marker="x",
                markersize=8,
                markeredgewidth=2,
                linestyle="none",
            )
            best = [loss for lr, loss in good if lr == rows[name]["lr"]]
            axes.plot([rows[name]["lr"]] * len(best), best, color=colour, **ring)
        _finish(axes, "learning rate")
        axes.set_xscale("log")
        axes.set_ylim(min(shown) - 2 * space, edge + space)
        _decades(axes.xaxis)

    said = []
    for name, found in trials.items():
        tried = ", ".join(
            f"{lr:g} ({loss:.3f})" if math.isfinite(loss) else f"{lr:g} (diverged)"
            for lr, loss in found
        )
        said.append(f"{name}: best {rows[name]['lr']:g}, tried {tried}.")
    svg = picture(
        "learning-rates", (440, 300), "Held-out loss by learning rate. " + " ".join(said), fill
    )
    return Picture(
        "Learning rate",
        "one seed; ringed: the best; × at the edge: diverged, or no better than untrained",
        svg,
        "half",
    )


def _trials(comparison: Record, name: str) -> list[tuple[float, float]]:
    """(Learning rate, held-out loss) of the runs that chose, infinite where one diverged, the lowest learning rate first."""
    found = [
        run for run in comparison["runs"] if run["optimizer"] == name and run["phase"] == "tuning"
    ]
    return sorted(
        (run["lr"], math.inf if run["diverged"] else run["validation_loss"]) for run in found
    )


def _updates(rows: Record) -> Picture:
    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, row in enumerate(rows.values()):
            moved = [(step, ratio) for step, ratio in row["updates"] if ratio > 0]
            every = max(1, len(moved) // MARKS)
            axes.plot(
                [step for step, _ in moved],
                [ratio for _, ratio in moved],
                markevery=every,
                **line(number),
            )
        _finish(axes, "steps")
        axes.set_yscale("log")
        _decades(axes.yaxis)

    said = [
        f"{name}: {row['updates'][0][1]:.2g} at first, {row['updates'][-1][1]:.2g} at the end."
        for name, row in rows.items()
        if row["updates"]
    ]
    svg = picture("updates", (440, 300), "Update over weights. " + " ".join(said), fill)
    return Picture(
        "Update to weight",
        "norm of a step's change over norm of the weights, without the token tables",
        svg,
        "half",
    )


def _finish(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_xlabel(label)
    axes.margins(x=0.03)


def _decades(axis: Any) -> None:
    """Ticks of a logarithmic axis, after the axis was made one."""
    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_formatter(NullFormatter())
