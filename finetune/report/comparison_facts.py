"""The words and numbers of a comparison's page: how it was made, its limits, its tables."""

from typing import Any

from finetune.report import run_facts
from finetune.report.svg import tick
from finetune.run.metrics import MISSING
from finetune.run.wording import size

JsonObject = dict[str, Any]
"""An object of comparison.json, such as the whole file or the entry of one optimizer."""

FEW_SEEDS = 3
"""With fewer, the page shows each seed: an interval of two is wider than most differences."""

_LEFT_OUT = {
    "lr",
    "overrides",
    "layer_decay",
    "no_decay",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "maximize",
}
"""Settings that the table leaves out.

They are shown elsewhere, are the same for all, or have no influence on the result.
"""


def rules(comparison: JsonObject) -> list[str]:
    """Return how the comparison was made, as the items of a list."""
    protocol, target = comparison["protocol"], comparison["target"]
    seeds, norm = protocol["seeds"], protocol["max_grad_norm"]
    clipping = f"clipped to a norm of {norm:g}" if norm else "not clipped"
    grid = (
        f"The learning rate of each optimizer is the best of {protocol['trials']} on its own grid. "
        f"These are half a decade apart, all run with seed {protocol['tuning_seed']}."
    )
    if protocol["trials"] >= 3:
        times = protocol["max_widenings"]
        grid += f" If the best is at an end of the grid, one more is tried, at most {times} times."
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    found = [
        "With the same seed, every optimizer starts with the same weights. "
        "It also sees the same batches in the same order. "
        f"A batch holds {protocol['batch_size']} sequences. "
        f"A run takes {protocol['steps']:,} steps. "
        f"The precision is {protocol['precision']} and the schedule {protocol['schedule']}. "
        f"Gradients are {clipping}.",
        grid,
        f"The reported figures come from fresh runs, with {which}. "
        "They are those of the weights after the last step.",
        "The learning rate is chosen on the held-out data. "
        f"The result is reported on the test data. Here, {protocol['data_rule']}.",
        "An interval is the 95 % interval of the mean over seeds, by Student's t. "
        "An optimizer wins if its interval on the test data overlaps with no other. "
        "The difference to the best is taken seed by seed. "
        "Its interval is for that pair alone and does not decide who wins.",
        "A run diverged if a loss was above 300, if it or a gradient was not a number, or if the "
        f"average loss rose by {protocol['divergence_threshold']:g} nats above its best. "
        "Such runs are counted, and their optimizer is not ranked.",
        f"The held-out loss is measured {_every(protocol['evaluate_every'])}. "
        "Seconds count the training steps alone. "
        "The runs were made one after another on this machine.",
    ]
    if target["loss"] is not None:
        found.append(
            f"The target is a held-out loss of {target['loss']:.3f}. "
            f"It is {target['share']:.0%} of the way from the loss before training to the lowest "
            "mean loss after it. "
            "It is reached at the first evaluation at or below it. "
            "In the median, a seed that misses it counts as infinite."
        )
    return found


def caveats(comparison: JsonObject) -> list[str]:
    """Return what limits the result: first from the result itself, then the notes of the runs."""
    found, protocol = [], comparison["protocol"]
    if (seeds := len(protocol["seeds"])) < 3:
        found.append(
            f"{seeds} seed{'s are' if seeds > 1 else ' is'} too few to tell chance from merit."
        )
    if (trials := protocol["trials"]) < 3:
        found.append(
            f"{trials} learning rate{'s are' if trials > 1 else ' is'} not a search: "
            "the grid was not widened."
        )
    widened = [
        f"{name} {entry['widenings']}" for name, entry in ranked(comparison) if entry["widenings"]
    ]
    if widened:
        found.append(f"Learning rates added at the ends of the grid: {', '.join(widened)}.")
    if shared := _shared_machine(comparison):
        found.append(shared)
    for name, entry in ranked(comparison):
        if entry["at_edge"]:
            found.append(
                f"{name}: the best learning rate is still at an end of the grid. "
                "One beyond it may be better."
            )
        if diverged := entry["reported_diverged"]:
            found.append(f"{name}: {diverged} of {entry['reported_runs']} reported runs diverged.")
    return found + comparison["notes"]


def _shared_machine(comparison: JsonObject) -> str:
    """Return a warning if other programs used the machine during a run, else ""."""
    cores = comparison["environment"]["machine"]["cores"]
    load = max((run.get("load") or 0.0 for run in comparison["runs"]), default=0.0)
    if load < cores + 1:
        return ""
    return (
        f"The machine's {cores} cores had a load of up to {load:.0f}, so other programs used them. "
        "Seconds measured here are too long, and not comparable."
    )


def _every(steps: int) -> str:
    return "after every step" if steps == 1 else f"every {steps:,} steps"


def bins(comparison: JsonObject) -> str:
    """Return which tokens are head, body and tail, or "" if the losses were not split."""
    if not comparison["bins"]:
        return ""
    parts = [
        f"{name}: {part['tokens']:,} tokens of the vocabulary, "
        f"{part['targets']:,} of the test targets"
        for name, part in comparison["bins"].items()
    ]
    return (
        "Head tokens are the most frequent ones, which make up half of the training targets. "
        "Body tokens make up the next 40 %. "
        "Tail tokens are all others, including those that never occur in training. "
        f"{'; '.join(parts).capitalize()}."
    )


def subtitle(comparison: JsonObject) -> list[str]:
    """Return the parts of the line under the title: model, length of a run, date."""
    model, num_parameters = comparison["model"], comparison["model"]["parameters"]
    parameters = run_facts.parameter_count(num_parameters)
    steps = f"{comparison['protocol']['steps']:,} steps a run"
    started = run_facts.date_of(comparison["environment"]["started"])
    return [model.get("name") or model["architecture"], parameters, steps, started]


def run_counts(comparison: JsonObject) -> str:
    """Return how many runs there are, and how many of them diverged."""
    runs = comparison["runs"]
    return f"{len(runs)} runs, {sum(run['diverged'] for run in runs)} diverged"


def ranked(comparison: JsonObject) -> list[tuple[str, JsonObject]]:
    """Return the optimizers with the best first. Those that are not ranked come last."""
    ranking = comparison["verdict"]["ranking"]
    names = [*ranking, *(name for name in comparison["optimizers"] if name not in ranking)]
    return [(name, comparison["optimizers"][name]) for name in names]


def has_few_seeds(comparison: JsonObject) -> bool:
    """Return whether the page shows each seed in place of intervals."""
    return len(comparison["protocol"]["seeds"]) < FEW_SEEDS


def seed_losses(comparison: JsonObject, name: str, panel: str) -> list[float]:
    """Return the test loss of each seed over "all" tokens, or over those of a frequency."""
    key = "test_loss" if panel == "all" else f"test_loss_{panel}"
    return [
        run[key]
        for run in comparison["runs"]
        if run["optimizer"] == name and run["phase"] == "reported" and run[key] is not None
    ]


def optimizer_line(comparison: JsonObject, name: str) -> JsonObject:
    """Return the cells of one optimizer in the tables, as text."""
    entry, few = comparison["optimizers"][name], has_few_seeds(comparison)
    seeds = " and ".join(f"{loss:.3f}" for loss in seed_losses(comparison, name, "all"))
    to_target, trials = entry["to_target"], f"of {entry['tuning_trials']}"
    if entry["widenings"]:
        trials += f", {entry['widenings']} added"
    tuning = f"{entry['tuning_diverged']} of {entry['tuning_trials']}"
    reported = f"{entry['reported_diverged']} of {entry['reported_runs']}"
    settings = entry["settings"].items()
    return {
        "name": name,
        "lr": tick(entry["lr"]),
        "trials": trials + (", at the end" if entry["at_edge"] else ""),
        "test": _mean_and_interval(entry["test"], spread=seeds if few else None),
        "validation": _mean_and_interval(entry["validation"], spread="" if few else None),
        "difference": _mean_and_interval(
            entry["difference_to_best"], signed=True, spread="" if few else None
        ),
        "steps": MISSING if to_target["steps"] is None else f"{to_target['steps']:,.0f}",
        "reached": f"{to_target['reached']} of {entry['reported_runs']} seeds",
        "tokens": MISSING if to_target["tokens"] is None else f"{to_target['tokens']:,.0f} tokens",
        "seconds": "" if to_target["seconds"] is None else f"{to_target['seconds']:,.1f} s",
        "per_step": f"{1000 * entry['seconds_per_step']:,.0f} ms",
        "state": size(entry["state_bytes"]),
        "diverged": f"{tuning}, {reported}",
        "settings": ", ".join(
            f"{key} {_setting_text(value)}" for key, value in settings if key not in _LEFT_OUT
        ),
    }


def _mean_and_interval(
    value: JsonObject | None, *, signed: bool = False, spread: str | None = None
) -> tuple[str, str]:
    """Return the mean, and `spread`, which is by default the interval."""
    if value is None:
        return MISSING, ""
    form = "+.3f" if signed else ".3f"
    if spread is None:
        spread = "" if value["low"] is None else f"{value['low']:{form}} to {value['high']:{form}}"
    return f"{value['mean']:{form}}".replace("-", "−"), spread.replace("-", "−")


def _setting_text(value: Any) -> str:
    """Return a setting as one writes it in a config."""
    if isinstance(value, list):
        return "(" + ", ".join(map(_setting_text, value)) + ")"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_line(run: JsonObject) -> list[str]:
    """Return the cells of one run: phase, seed, lr, steps, held-out loss, test loss, seconds."""
    loss = "diverged" if run["diverged"] else f"{run['validation_loss']:.4f}"
    test = MISSING if run["test_loss"] is None else f"{run['test_loss']:.4f}"
    phase = "widening" if run["widening"] else run["phase"]
    return [
        phase,
        str(run["seed"]),
        tick(run["lr"]),
        f"{run['steps']:,}",
        loss,
        test,
        f"{run['seconds']:,.1f}",
    ]
