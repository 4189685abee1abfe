"""Where the numbers of a run go: `metrics.jsonl` always, and Accelerate's trackers where they are asked for.

Floor 2.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Listener = Callable[[Mapping[str, Any]], None]


class MetricLogger:
    """Appends one JSON object a step to `path` and hands it to the listeners (progress display, trackers)."""

    def __init__(self, path: Path, *, listeners: tuple[Listener, ...] = ()) -> None:
        self._path = path
        self._listeners = listeners
        path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")
        for listener in self._listeners:
            listener(record)


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run will take again, and a last line that was cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def tracker_values(record: Mapping[str, Any]) -> dict[str, float]:
    """A record as flat numbers for a tracker: {"train/loss": …} or {"evaluation/loss": …}."""
    part, values = (
        ("evaluation", record["evaluation"]) if "evaluation" in record else ("train", record)
    )
    return {
        f"{part}/{key}": value
        for key, value in values.items()
        if isinstance(value, int | float) and key != "step"
    }


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such a value is written as text, so that the line shows it and stays valid."""
    return {
        key: finite(value)
        if isinstance(value, Mapping)
        else str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in record.items()
    }
