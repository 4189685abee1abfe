"""The drawings of a comparison. Each has a text alternative with its numbers.

There are lines: loss against cost, loss against learning rate, size of the updates. Each has its
legend. Other drawings list the optimizers one below the other: test loss, steps to the target,
optimizer state. All have the same width and the same order of the optimizers, the best first.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from finetune.comparison.frequency import BINS
from finetune.report.comparison_facts import JsonObject, has_few_seeds, ranked, seed_losses
from finetune.report.svg import INK, Picture, draw_svg, line_style, look, tick

COSTS = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training"}
_LOSS = "held-out loss, nats"
_WIDTH = 440  # of every drawing, so that their letters have one size
_MARKS = 12  # markers on a line, about
_CROSS: dict[str, Any] = {"marker": "x", "markeredgewidth": 2, "linestyle": "none"}


def pictures_of(comparison: JsonObject) -> list[Picture]:
    """Return all drawings but those of `cost_pictures`, in the order of the page."""
    panels = {name: f"{name}, {part['tokens']:,} tokens" for name, part in _bins(comparison)}
    found = [
        _test_losses(comparison, "all", "all tokens"),
        _learning_rates(comparison),
        _updates(comparison),
    ]
    if comparison["target"]["loss"] is not None:
        found.append(_steps_to_target(comparison))
    found.append(_state_sizes(comparison))
    return found + [_test_losses(comparison, panel, title) for panel, title in panels.items()]


def cost_pictures(comparison: JsonObject) -> list[tuple[str, Picture]]:
    """Return the held-out loss against each of COSTS, with the key of the cost."""
    return [(key, _learning(comparison, key)) for key in COSTS]


def _bins(comparison: JsonObject) -> list[tuple[str, JsonObject]]:
    bins = comparison["bins"]
    return [(name, bins[name]) for name in BINS if bins and bins[name]["targets"]]


def _learning(comparison: JsonObject, key: str) -> Picture:
    """Draw the mean held-out loss, with a band from the lowest to the highest seed."""
    entries, target = ranked(comparison), comparison["target"]["loss"]

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (_, entry) in enumerate(entries):
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
        _finish(axes, COSTS[key], _LOSS)

    sentences = []
    for name, entry in entries:
        if curve := entry["curve"]:
            start, end = curve[0]["loss"], curve[-1]["loss"]
            sentences.append(f"{name}: {start:.3f} at first, {end:.3f} at the end.")
    title = f"Held-out loss against {COSTS[key]}"
    svg = _draw_lines(f"by-{key}", entries, f"{title}. " + " ".join(sentences), fill)
    return Picture("Held-out loss", "mean and range over seeds, against", svg)


def _draw_lines(
    name: str,
    entries: Sequence[tuple[str, JsonObject]],
    description: str,
    fill: Callable[[Figure], None],
) -> str:
    """Return a drawing of lines, above which a legend names the optimizers."""
    names = [each for each, _ in entries]
    columns = max(1, min(len(names), (_WIDTH - 10) // (62 + 7 * max(map(len, names), default=1))))

    def fill_with_legend(figure: Figure) -> None:
        fill(figure)
        handles = [Line2D([], [], label=each, **line_style(i)) for i, each in enumerate(names)]
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=columns,
            handlelength=3.6,
            borderaxespad=0,
            columnspacing=1.4,
        )

    height = 280 + 19 * math.ceil(len(names) / columns)
    return draw_svg(name, (_WIDTH, height), description, fill_with_legend)


def _learning_rates(comparison: JsonObject) -> Picture:
    """Draw held-out loss against learning rate.

    A run that diverged, or that ended above the loss before training, is a cross at the upper edge.
    """
    entries = ranked(comparison)
    optimizers = dict(entries)
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
        _finish(axes, "learning rate", _LOSS)
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
    svg = _draw_lines("learning-rates", entries, description, fill)
    return Picture("Learning rate", unit, svg)


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


def _updates(comparison: JsonObject) -> Picture:
    """Draw the norm of a step's change over the norm of the weights."""
    entries = ranked(comparison)

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (_, entry) in enumerate(entries):
            moved = [(step, ratio) for step, ratio in entry["updates"] if ratio > 0]
            steps, ratios = [step for step, _ in moved], [ratio for _, ratio in moved]
            every = max(1, len(moved) // _MARKS)
            axes.plot(steps, ratios, markevery=every, **line_style(number))
        _finish(axes, "steps", "share of the weights")
        axes.set_yscale("log")
        _decades(axes.yaxis)

    sentences = [
        f"{name}: {entry['updates'][0][1]:.2g} at first, {entry['updates'][-1][1]:.2g} at the end."
        for name, entry in entries
        if entry["updates"]
    ]
    description = "Size of an update. " + " ".join(sentences)
    unit = "norm of a step's change divided by the norm of the weights, without the token tables"
    svg = _draw_lines("updates", entries, description, fill)
    return Picture("Size of an update", unit, svg)


def _test_losses(comparison: JsonObject, panel: str, title: str) -> Picture:
    """Draw the test loss over the tokens of `panel`, the best optimizer on top.

    With few seeds there is a dot for each seed. With more there is the mean and its interval.
    """
    entries, few = ranked(comparison), has_few_seeds(comparison)

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        for place, (name, entry) in enumerate(entries):
            found = seed_losses(comparison, name, panel) if few else []
            _dot(axes, _test_of(entry, panel), place, found)
        _list_down(axes, [name for name, _ in entries], "test loss, nats")

    means = {name: (_test_of(entry, panel) or {}).get("mean") for name, entry in entries}
    sentences = [
        f"{name}: {'diverged' if mean is None else f'{mean:.3f}'}." for name, mean in means.items()
    ]
    description = f"Test loss, {title}. " + " ".join(sentences)
    unit = f"{title}; {'one dot a seed' if few else 'mean and 95 % interval'}"
    height = 70 + 28 * len(entries)
    svg = draw_svg(f"test-{panel}", (_WIDTH, height), description, fill)
    return Picture("Test loss", unit, svg)


def _steps_to_target(comparison: JsonObject) -> Picture:
    """Draw a dot for each seed, and at the right edge a cross with the number of misses."""
    entries, steps = ranked(comparison), comparison["protocol"]["steps"]
    names = [name for name, _ in entries]
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
    for name, entry in entries:
        found = entry["to_target"]
        median = "missed" if found["steps"] is None else f"{found['steps']:g} steps"
        reached = f"reached by {found['reached']} of {entry['reported_runs']}"
        sentences.append(f"{name}: median {median}, {reached}.")
    description = "Steps to the target. " + " ".join(sentences)
    target = f"to a held-out loss of {comparison['target']['loss']:.3f}"
    unit = f"{target}; one dot per seed; ×: the number of seeds that missed it"
    svg = draw_svg("to-target", (_WIDTH, 70 + 28 * len(names)), description, fill)
    return Picture("Steps to target", unit, svg)


def _state_sizes(comparison: JsonObject) -> Picture:
    """Draw the memory that each optimizer keeps in addition to the weights."""
    names = [name for name, _ in ranked(comparison)]
    sizes = [entry["state_bytes"] / 2**20 for _, entry in ranked(comparison)]

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
    svg = draw_svg("state", (_WIDTH, height), f"Optimizer state. {sentences}", fill)
    return Picture("Optimizer state", "MiB after the last step, measured", svg)


def _test_of(entry: JsonObject, panel: str) -> JsonObject | None:
    return entry["test"] if panel == "all" else (entry["test_by_frequency"] or {}).get(panel)


def _dot(axes: Axes, interval: JsonObject | None, place: int, seeds: Sequence[float]) -> None:
    """Draw the dots of `seeds` or, without them, the mean with its interval.

    An optimizer without an interval gets the word "diverged".
    """
    if interval is None:
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate("diverged", (0.03, place), color=INK, fontsize=10, **where)
        return
    colour, marker = look(place).colour, look(place).marker
    low, high = interval["low"], interval["high"]
    if not seeds and low is not None:
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
    points = list(seeds) or [interval["mean"]]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 7}
    axes.plot(points, [place] * len(points), linestyle="none", **style)


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


def _finish(axes: Axes, along: str, up: str) -> None:
    """Set the ticks of both axes and their names: of `along`, and of `up`."""
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_xlabel(along)
    axes.set_ylabel(up)
    axes.margins(x=0.03)


def _decades(axis: Any) -> None:
    """Set the ticks of an axis that was made logarithmic before: 1e-3, 1e-2, 1e-1, 1."""
    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_major_formatter(
        FuncFormatter(
            lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value < 1 else tick(value)
        )
    )
    axis.set_minor_formatter(NullFormatter())
