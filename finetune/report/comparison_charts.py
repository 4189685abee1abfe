"""The drawings of a comparison. Each has a text alternative with its numbers.

First the lines: loss against cost, loss against learning rate, size of the updates. Then the
drawings that list the optimizers one below the other: test loss, steps to the target, optimizer
state.
"""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from finetune.comparison.frequency import BINS
from finetune.report.comparison_facts import JsonObject, ranked
from finetune.report.svg import INK, Picture, draw_svg, line_style, look, tick

COSTS = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training"}
_MARKS = 12  # markers on a line, about
_CROSS: dict[str, Any] = {"marker": "x", "markeredgewidth": 2, "linestyle": "none"}


def pictures_of(comparison: JsonObject) -> list[Picture]:
    """Return all drawings in the order of the page."""
    optimizers = comparison["optimizers"]
    target = comparison["target"]["loss"]
    found = [
        _test_losses(comparison),
        *(_learning(optimizers, key, target) for key in COSTS),
        _learning_rates(comparison),
        _updates(optimizers),
    ]
    if target is not None:
        found.append(_steps_to_target(comparison))
    return [*found, _state_sizes(optimizers)]


def legend(names: Sequence[str]) -> str:
    """Return a strip that shows the line and the marker of each optimizer."""

    def fill(figure: Figure) -> None:
        handles = [
            Line2D([], [], label=name, **line_style(number)) for number, name in enumerate(names)
        ]
        figure.legend(
            handles=handles,
            loc="center left",
            ncols=7,
            handlelength=3.6,
            borderaxespad=0,
            columnspacing=1.8,
        )

    size = (920, 26 * math.ceil(len(names) / 7))
    return draw_svg("legend", size, "Legend: " + ", ".join(names) + ".", fill)


def _learning(optimizers: JsonObject, key: str, target: float | None) -> Picture:
    """Draw the mean held-out loss, with a band from the lowest to the highest seed."""

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, entry in enumerate(optimizers.values()):
            curve, colour = entry["curve"], look(number).colour
            along = [point[key] for point in curve]
            low, high = [point["lowest"] for point in curve], [point["highest"] for point in curve]
            losses = [point["loss"] for point in curve]
            axes.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0)
            every = max(1, len(curve) // _MARKS)
            axes.plot(along, losses, markevery=every, **line_style(number))
            if entry["reported_diverged"] and curve:
                axes.plot(along[-1], losses[-1], color=colour, markersize=9, **_CROSS)
        if target is not None:
            axes.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
            place: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "ha": "left",
                "va": "bottom",
            }
            axes.annotate("target", (0.015, target), color=INK, fontsize=10, **place)
        _finish(axes, COSTS[key])

    sentences = []
    for name, entry in optimizers.items():
        if curve := entry["curve"]:
            start, end = curve[0]["loss"], curve[-1]["loss"]
            sentences.append(f"{name}: {start:.3f} at first, {end:.3f} at the end.")
    title = f"Held-out loss against {COSTS[key].split()[0]}"
    svg = draw_svg(f"by-{key}", (330, 260), f"{title}. " + " ".join(sentences), fill)
    return Picture(title, "mean and range over seeds", svg, "third")


def _learning_rates(comparison: JsonObject) -> Picture:
    """Draw held-out loss against learning rate.

    A run that diverged, or that ended above the loss before training, is a cross at the upper edge.
    """
    optimizers = comparison["optimizers"]
    trials = {name: _trials(comparison, name) for name in optimizers}
    untrained = max(
        (entry["curve"][0]["loss"] for entry in optimizers.values() if entry["curve"]),
        default=math.inf,
    )
    shown = [loss for found in trials.values() for _, loss in found if loss <= untrained]
    shown = shown or [0.0, 1.0]
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
            colour, chosen = look(number).colour, optimizers[name]["lr"]
            good = [(lr, loss) for lr, loss in found if loss <= untrained]
            axes.plot([lr for lr, _ in good], [loss for _, loss in good], **line_style(number))
            bad = [lr for lr, loss in found if not loss <= untrained]
            axes.plot(bad, [edge] * len(bad), color=colour, markersize=8, **_CROSS)
            best = [loss for lr, loss in good if lr == chosen]
            axes.plot([chosen] * len(best), best, color=colour, **ring)
        _finish(axes, "learning rate")
        axes.set_xscale("log")
        axes.set_ylim(min(shown) - 2 * space, edge + space)
        _decades(axes.xaxis)

    sentences = []
    for name, found in trials.items():
        tried = ", ".join(
            f"{lr:g} ({loss:.3f})" if math.isfinite(loss) else f"{lr:g} (diverged)"
            for lr, loss in found
        )
        sentences.append(f"{name}: best {optimizers[name]['lr']:g}, tried {tried}.")
    description = "Held-out loss by learning rate. " + " ".join(sentences)
    unit = "one seed; a ring marks the best; × at the top: diverged, or no better than untrained"
    svg = draw_svg("learning-rates", (440, 300), description, fill)
    return Picture("Learning rate", unit, svg, "half")


def _trials(comparison: JsonObject, name: str) -> list[tuple[float, float]]:
    """Return (learning rate, held-out loss) of the tuning runs, the lowest learning rate first.

    The loss is infinite if the run diverged.
    """
    found = [
        run for run in comparison["runs"] if run["optimizer"] == name and run["phase"] == "tuning"
    ]
    return sorted(
        (run["lr"], math.inf if run["diverged"] else run["validation_loss"]) for run in found
    )


def _updates(optimizers: JsonObject) -> Picture:
    """Draw the norm of a step's change over the norm of the weights."""

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, entry in enumerate(optimizers.values()):
            moved = [(step, ratio) for step, ratio in entry["updates"] if ratio > 0]
            steps, ratios = [step for step, _ in moved], [ratio for _, ratio in moved]
            every = max(1, len(moved) // _MARKS)
            axes.plot(steps, ratios, markevery=every, **line_style(number))
        _finish(axes, "steps")
        axes.set_yscale("log")
        _decades(axes.yaxis)

    sentences = [
        f"{name}: {entry['updates'][0][1]:.2g} at first, {entry['updates'][-1][1]:.2g} at the end."
        for name, entry in optimizers.items()
        if entry["updates"]
    ]
    description = "Size of an update. " + " ".join(sentences)
    unit = "norm of a step's change divided by the norm of the weights, without the token tables"
    svg = draw_svg("updates", (440, 300), description, fill)
    return Picture("Size of an update", unit, svg, "half")


def _test_losses(comparison: JsonObject) -> Picture:
    """Draw the test loss with its interval, over all tokens and by frequency; the best on top."""
    optimizers, bins = comparison["optimizers"], comparison["bins"]
    order = [name for name, _ in ranked(comparison)]
    numbers = {name: number for number, name in enumerate(optimizers)}
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
                _dot(axes, _test_of(optimizers[name], panel), place, numbers[name])
            _list_down(axes, order, "")
            axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))

    sentences = []
    for name in order:
        means = {panel: (_test_of(optimizers[name], panel) or {}).get("mean") for panel in titles}
        parts = [
            f"{panel} {'diverged' if mean is None else f'{mean:.3f}'}"
            for panel, mean in means.items()
        ]
        sentences.append(f"{name}: {', '.join(parts)}.")
    description = "Test loss. " + " ".join(sentences)
    unit = "nats per target token; mean and 95 % interval; by the frequency of a token in training"
    svg = draw_svg("test", (920, 80 + 26 * len(order)), description, fill)
    return Picture("Test loss", unit, svg, "wide")


def _steps_to_target(comparison: JsonObject) -> Picture:
    """Draw a dot for each seed, and at the right edge a cross with the number of misses."""
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
                axes.plot([steps * 1.1], [place], color=colour, markersize=8, **_CROSS)
                _note(axes, f"{missed}", steps * 1.1, place)
        _list_down(axes, names, "steps")
        axes.set_xlim(0, steps * 1.2)

    sentences = []
    for name, entry in comparison["optimizers"].items():
        found = entry["to_target"]
        median = "missed" if found["steps"] is None else f"{found['steps']:g} steps"
        reached = f"reached by {found['reached']} of {entry['reported_runs']}"
        sentences.append(f"{name}: median {median}, {reached}.")
    description = "Steps to the target. " + " ".join(sentences)
    target = f"to a held-out loss of {comparison['target']['loss']:.3f}"
    unit = f"{target}; one dot per seed; ×: the number of seeds that missed it"
    svg = draw_svg("to-target", (440, 70 + 28 * len(names)), description, fill)
    return Picture("Steps to target", unit, svg, "half")


def _state_sizes(optimizers: JsonObject) -> Picture:
    """Draw the memory that each optimizer keeps in addition to the weights."""
    names = list(optimizers)
    sizes = [entry["state_bytes"] / 2**20 for entry in optimizers.values()]

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        colours = [look(number).colour for number in range(len(names))]
        axes.barh(range(len(names)), sizes, color=colours, height=0.55)
        for place, size in enumerate(sizes):
            _note(axes, f"{size:,.3g}", size, place)
        _list_down(axes, names, "MiB")
        axes.set_xlim(0, max(sizes) * 1.18 or 1)

    sentences = " ".join(f"{name}: {size:,.3g} MiB." for name, size in zip(names, sizes))
    height = 70 + 28 * len(names)
    svg = draw_svg("state", (440, height), f"Optimizer state. {sentences}", fill)
    return Picture("Optimizer state", "MiB after the last step, measured", svg, "half")


def _test_of(entry: JsonObject, panel: str) -> JsonObject | None:
    return entry["test"] if panel == "all" else (entry["test_by_frequency"] or {}).get(panel)


def _dot(axes: Axes, interval: JsonObject | None, place: int, number: int) -> None:
    """Draw a mean with its interval, or the word "diverged"."""
    if interval is None:
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate("diverged", (0.03, place), color=INK, fontsize=10, **where)
        return
    colour, low, high = look(number).colour, interval["low"], interval["high"]
    if low is not None:
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
    axes.plot([interval["mean"]], [place], color=colour, marker=look(number).marker, markersize=7)


def _note(axes: Axes, text: str, along: float, place: int) -> None:
    """Write `text` to the right of a point."""
    where: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (along, place), color=INK, fontsize=10, **where)


def _list_down(axes: Axes, names: Sequence[str], label: str) -> None:
    """Give each name a line of the drawing, from the top down; `label` names the other axis."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_axisbelow(True)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_xlabel(label)


def _finish(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_xlabel(label)
    axes.margins(x=0.03)


def _decades(axis: Any) -> None:
    """Set the ticks of an axis that was made logarithmic before."""
    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_formatter(NullFormatter())
