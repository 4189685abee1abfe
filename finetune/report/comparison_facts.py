"""The words and numbers of a comparison's page: how it was made, what to hold against it, the lines of its tables.

Floor 1.
"""

from typing import Any

from finetune.report import run_facts
from finetune.run.wording import size

Record = dict[str, Any]

UNTOLD = {
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
"""Settings that the table leaves out: shown elsewhere, the same for all, or without influence on the result."""


def rules(comparison: Record) -> list[str]:
    """How the comparison was made, a sentence each."""
    protocol, target = comparison["protocol"], comparison["target"]
    seeds, norm = protocol["seeds"], protocol["max_grad_norm"]
    found = [
        "With the same seed every optimizer begins with the same weights and sees the same batches of "
        f"{protocol['batch_size']} rows in the same order, for {protocol['steps']:,} steps, in {protocol['precision']}, with the "
        f"{protocol['schedule']} schedule and {f'gradients clipped to a norm of {norm:g}' if norm else 'no clipping'}.",
        f"The learning rate of each optimizer is the best of {protocol['trials']} on a grid of its own, half a decade apart, "
        f"all run with seed {protocol['tuning_seed']}."
        + (
            f" Where the best lies at an end the grid is widened by one, at most {protocol['max_widenings']} times."
            if protocol["trials"] >= 3
            else ""
        ),
        f"What is reported comes from fresh runs, with seed{'s' * (len(seeds) > 1)} "
        f"{seeds[0] if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'}: the weights after the last step.",
        f"Chosen on the held-out rows, reported on the test rows: {protocol['data_rule']}.",
        "An interval is a mean over seeds with 95 % by Student's t. An optimizer wins if its interval on the test data overlaps "
        "with no other's. The difference to the best is taken seed by seed; its interval is for that pair alone and decides "
        "nothing.",
        "A run diverged if a loss or a gradient was not a number, or the loss rose by "
        f"{protocol['divergence_threshold']:g} nats above its best. It is counted, and its optimizer is not ranked.",
        f"Held-out loss every {protocol['evaluate_every']:,} steps, off the clock. Seconds are of training steps alone, one run "
        "after another on this machine.",
    ]
    if target["loss"] is not None:
        found.append(
            f"The target, a held-out loss of {target['loss']:.3f}, is {target['share']:.0%} of the way from the loss before "
            "training to the lowest mean loss after it. Steps to it are those at the first evaluation at or below it; a miss "
            "counts as infinite in the median."
        )
    return found


def caveats(comparison: Record) -> list[str]:
    """What to hold against the result, from the result itself, then the notes of the runs."""
    found, protocol = [], comparison["protocol"]
    if (seeds := len(protocol["seeds"])) < 3:
        found.append(
            f"{seeds} seed{'s are' if seeds > 1 else ' is'} too few to tell chance from merit."
        )
    if (trials := protocol["trials"]) < 3:
        found.append(
            f"{trials} learning rate{'s are' if trials > 1 else ' is'} no search: the grid was not widened."
        )
    widened = [
        f"{name} ({row['widenings']})"
        for name, row in comparison["optimizers"].items()
        if row["widenings"]
    ]
    if widened:
        found.append(
            f"Grids that were widened, by so many trials beyond the {trials} planned: {', '.join(widened)}."
        )
    for name, row in comparison["optimizers"].items():
        if row["at_edge"]:
            found.append(
                f"{name}: the best learning rate still lies at the end of what was tried; it may do better beyond."
            )
        if row["reported_diverged"]:
            found.append(
                f"{name}: {row['reported_diverged']} of {row['reported_runs']} reported runs diverged."
            )
    return found + comparison["notes"]


def bins(comparison: Record) -> str:
    """Which tokens head, body and tail are."""
    if not comparison["bins"]:
        return ""
    parts = [
        f"{name}: {part['tokens']:,} tokens of the vocabulary, {part['targets']:,} of the test targets"
        for name, part in comparison["bins"].items()
    ]
    return (
        "Head are the most frequent tokens that make up half of the training targets, body those of the next 40 %, tail all "
        f"others, also what never occurs there. {'; '.join(parts).capitalize()}."
    )


def subtitle(comparison: Record) -> list[str]:
    """What stands under the title: model, length, date."""
    model, size = comparison["model"], comparison["model"]["parameters"]
    count = f"{size / 1e6:,.1f} M parameters" if size >= 1e6 else f"{size:,} parameters"
    steps = f"{comparison['protocol']['steps']:,} steps a run"
    return [model["architecture"], count, steps, comparison["environment"]["started"][:10]]


def state(comparison: Record) -> str:
    runs = comparison["runs"]
    return f"{len(runs)} runs, {sum(run['diverged'] for run in runs)} diverged"


def ranked(comparison: Record) -> list[tuple[str, Record]]:
    """The optimizers with the best first; those that are not ranked come last."""
    ranking = comparison["verdict"]["ranking"]
    names = [*ranking, *(name for name in comparison["optimizers"] if name not in ranking)]
    return [(name, comparison["optimizers"][name]) for name in names]


def line(name: str, row: Record) -> Record:
    """One optimizer in the table, as text."""
    to = row["to_target"]
    trials = f"of {row['tuning_trials']}" + (
        f", {row['widenings']} added" if row["widenings"] else ""
    )
    return {
        "name": name,
        "lr": f"{row['lr']:g}",
        "trials": trials + (", at the end" if row["at_edge"] else ""),
        "test": value(row["test"]),
        "validation": value(row["validation"]),
        "difference": value(row["difference_to_best"], signed=True),
        "steps": run_facts.MISSING if to["steps"] is None else f"{to['steps']:,.0f}",
        "reached": f"{to['reached']} of {row['reported_runs']} seeds",
        "tokens": run_facts.MISSING if to["tokens"] is None else f"{to['tokens']:,.0f} tokens",
        "seconds": "" if to["seconds"] is None else f"{to['seconds']:,.1f} s",
        "per_step": f"{1000 * row['seconds_per_step']:,.0f} ms",
        "state": size(row["state_bytes"]),
        "diverged": f"{row['tuning_diverged']} of {row['tuning_trials']}, {row['reported_diverged']} of {row['reported_runs']}",
        "settings": ", ".join(
            f"{key} {plain(value)}" for key, value in row["settings"].items() if key not in UNTOLD
        ),
    }


def value(value: Record | None, *, signed: bool = False) -> tuple[str, str]:
    """(Mean, interval) as text."""
    if value is None:
        return run_facts.MISSING, ""
    form = "+.3f" if signed else ".3f"
    spread = "" if value["low"] is None else f"{value['low']:{form}} to {value['high']:{form}}"
    return f"{value['mean']:{form}}".replace("-", "−"), spread.replace("-", "−")


def plain(value: Any) -> str:
    """A setting as one would write it."""
    if isinstance(value, list):
        return "(" + ", ".join(map(plain, value)) + ")"
    return (
        f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def run_line(run: Record) -> list[str]:
    """One run in the table at the end: phase, seed, lr, steps, held-out loss, test loss, seconds."""
    loss = "diverged" if run["diverged"] else f"{run['validation_loss']:.4f}"
    test = run_facts.MISSING if run["test_loss"] is None else f"{run['test_loss']:.4f}"
    phase = "widening" if run["widening"] else run["phase"]
    return [
        phase,
        str(run["seed"]),
        f"{run['lr']:g}",
        f"{run['steps']:,}",
        loss,
        test,
        f"{run['seconds']:,.1f}",
    ]
