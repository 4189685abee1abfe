"""`finetune runs`: the runs below a folder, each on a line."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from rich.table import Table

from finetune.config.yaml12 import parse
from finetune.display import plain_console
from finetune.errors import UserError, visible
from finetune.run.claim import is_held
from finetune.run.marker import read_marker
from finetune.run.metrics import METRICS, Metric
from finetune.run.records import RunRecords, read_run

_DEPTH = 2  # folders below the given one
_SHOWN = ("loss", "chrf")


def print_runs(root: Path) -> int:
    """Print a table of the runs in `root`, the newest last, and return how many there are.

    Raises UserError if there is no such folder.
    """
    if not root.is_dir():
        what = f"{root} is a file" if root.exists() else f"there is no folder {root}"
        raise UserError(f"{what} (looked in {Path.cwd()}). Name the folder that holds runs")
    table = Table(box=None, padding=(0, 2, 0, 0))
    metrics = [metric for metric in METRICS if metric.key in _SHOWN]
    for name in ("run", "started", "state", "model", "steps", *(m.short for m in metrics)):
        is_number = name in ("steps", "loss", "chrF")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    rows = sorted((_row(folder, metrics) for folder in _run_folders(root, _DEPTH)), key=_started)
    for row in rows:
        table.add_row(*map(visible, row))
    if rows:
        console = plain_console()
        (console if console.is_terminal else plain_console(width=140)).print(table)
    else:
        print(f"there is no run in {root}")
    return len(rows)


def state_of(run: RunRecords, *, held: bool) -> str:
    """Return what became of a run: "training" if a process holds its folder now."""
    if held:
        return "training"
    if run.diverged:
        return "diverged"
    if not run.finished:
        return "stopped"
    early = any(note.startswith("stopped early") for note in run.notes)
    return "stopped early" if early else "finished"


def _is_above(folder: Path, root: Path) -> bool:
    """Return whether a link leads back to where it lies in."""
    return folder.is_symlink() and root.resolve().is_relative_to(folder.resolve())


def _run_folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield the folders of runs. The runs of a comparison are part of it, and are left out."""
    try:
        marker = read_marker(root)
    except UserError:
        yield root  # its row says that it is broken
        return
    if marker is not None and marker.kind == "run":
        yield root
    elif marker is None and depth >= 0:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            if _is_above(folder, root):
                continue
            yield from _run_folders(folder, depth - 1)


def _row(folder: Path, metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Return the row of a run, also of one whose files are damaged."""
    try:
        return _row_of(read_run(folder), folder, metrics)
    except (UserError, OSError, yaml.YAMLError, AttributeError):
        return (str(folder), "", "broken", "", "", *("" for _ in metrics))


def _row_of(run: RunRecords, folder: Path, metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Return the row. Raises YAMLError or AttributeError for a damaged config."""
    model = (parse(run.config) or {}).get("model") or {}
    last = run.after.metrics if run.after is not None else {}
    return (
        str(folder),
        run.environment.started[:16].replace("T", " "),
        state_of(run, held=is_held(folder)),
        str(model.get("name") or f"a random {(model.get('config') or {}).get('model_type')}"),
        f"{run.steps[-1].step:,}" if run.steps else "0",
        *(metric.show(last) if metric.key in last else "" for metric in metrics),
    )


def _started(row: tuple[str, ...]) -> str:
    return row[1]
