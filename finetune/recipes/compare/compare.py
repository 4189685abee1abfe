"""`finetune compare`: optimizers on one config, each at its best rate, over several seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.comparison.summary import summarise
from finetune.config import RunConfig, load_config
from finetune.display import Display, on_terminal
from finetune.errors import UserError
from finetune.recipes.build.look import take_list
from finetune.recipes.compare.candidates import (
    DEFAULT_OPTIMIZERS,
    check_candidates,
    optimizer_names,
    section_for,
)
from finetune.recipes.compare.data import data_rule
from finetune.recipes.compare.outcome import write_outcome
from finetune.recipes.compare.study import (
    best_of,
    outcome_in_words,
    prepare_study,
    report_stop,
    tune_learning_rate,
)
from finetune.recipes.compare.trial import Tally, run_trial
from finetune.run.claim import locked
from finetune.run.trials import Run
from finetune.training.trainer import Stopped


def compare_optimizers(
    path: Path,
    overrides: Sequence[str],
    *,
    trials: int,
    seeds: int,
    budget: int | None,
    display: Display | None = None,
) -> Stopped:
    """Compare optimizers, print the verdict, and write the comparison to the folder of the config.

    Each optimizer's learning rate is the best of `trials` runs, or more if its grid is widened. The
    best is then run with `seeds` fresh seeds. Raises UserError for anything wrong with config or
    optimizers, and for a folder that holds another comparison.
    """
    display = display or Display()
    names, others = take_list(overrides, "optimizer.name")
    folder = f"output_dir={json.dumps(str(Path('runs') / f'compare-{path.stem}'))}"
    config = load_config(path, [folder, *others])
    optimizers = optimizer_names(DEFAULT_OPTIMIZERS if names is None else names)
    given = config.optimizer.model_fields_set
    if "lr" in given:
        display.note("optimizer.lr has no effect here: each optimizer is run at its own best")
    if "name" in given and names is None:
        display.note(
            "optimizer.name of the config has no effect here. Name what to compare in the command: "
            "optimizer.name=[A,B]"
        )
    notes = check_candidates(config, optimizers)
    with locked(config.output_dir, display.note):
        base = prepare_study(config, trials=trials, budget=budget, test=True, display=display)
        display.say(
            f"{len(optimizers)} optimizers x ({trials} learning rates + {seeds} seeds), "
            f"in {config.output_dir}"
        )
        tally = Tally(len(optimizers) * (trials + seeds))
        tuning: dict[str, list[Run]] = {}
        for name in optimizers:
            found = tune_learning_rate(
                base, name, trials=trials, decays=(), display=display, tally=tally
            )
            if found is None:
                return report_stop(config, display)
            tuning[name] = found
            tally.total += max(0, len(found) - trials)  # its grid was widened
        reported = _run_seeds(base, tuning, seeds=seeds, display=display, tally=tally)
        if reported is None:
            return report_stop(config, display)
        _check_starts(reported, config.output_dir)
        summary = summarise(tuning, reported, grid_size=trials)
        rule = data_rule(config.data)
        page = write_outcome(summary, base, rule=rule, trials=trials, seeds=seeds, notes=notes)
        for sentence in (*summary["verdict"]["sentences"], f"comparison: {page}"):
            print(on_terminal(sentence))
        return "finished"


def _run_seeds(
    base: RunConfig,
    tuning: Mapping[str, Sequence[Run]],
    *,
    seeds: int,
    display: Display,
    tally: Tally,
) -> dict[str, list[Run]] | None:
    """Run each optimizer with each seed at its best learning rate; return None after a signal.

    All optimizers run with one seed before the next seed. So a drift of the machine, such as its
    heat, meets all of them alike.
    """
    reported: dict[str, list[Run]] = {name: [] for name in tuning}
    for seed in range(base.seed + 1, base.seed + 1 + seeds):
        for name, tried in tuning.items():
            lr = best_of(tried).result.lr
            trial = base.model_copy(
                update={
                    "optimizer": section_for(base.optimizer, name, lr=lr),
                    "seed": seed,
                    "output_dir": base.output_dir / "runs" / name / f"seed-{seed}",
                }
            )
            run = run_trial(trial, phase="reported", display=display, tally=tally)
            if run is None:
                return None
            reported[name].append(run)
            display.say(f"{name}, lr {lr:g}, seed {seed}: {outcome_in_words(run)}")
    return reported


def _check_starts(reported: Mapping[str, Sequence[Run]], root: Path) -> None:
    """Raise UserError unless with each seed all optimizers began with the same weights and data."""
    for alike in zip(*reported.values()):
        if any(run.result.start != alike[0].result.start for run in alike):
            raise UserError(
                f"in {root} the runs of seed {alike[0].result.seed} began with different weights "
                "or data, so something changed since the comparison was begun. "
                "Delete the folder, and start again"
            )
