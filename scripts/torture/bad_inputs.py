"""Bad inputs: each is tried in a copy of a folder with a config, data, a run, a model and a .gguf.

A bad input has to end in a sentence with exit code 2, or is accepted if it may be. It must never
end in a traceback, hang, kill the process, or run code that a file brings.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.torture.warm import Ended, import_what, run

MARKER = "executed"
"""The file that a payload writes if it runs. It is written to the working directory."""

Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """A bad input: a change of the folder, and the command that meets it."""

    name: str
    arguments: list[str] = field(default_factory=lambda: ["train", "c.yaml", "--dry-run"])
    spoil: Spoil = lambda folder: None
    refused: bool = False  # it must not be accepted


class Payload:
    """An object whose pickle writes MARKER when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


def deep(levels: int) -> str:
    """Return nested lists as JSON."""
    return "[" * levels + "]" * levels


def values(chance: random.Random) -> list[Any]:
    """Return values that no reader of JSON expects."""
    small, large = chance.choice((-1, -7, 0)), 10 ** chance.choice((9, 12, 18, 30))
    return [
        *(None, True, False, small, large, float("nan"), float("inf"), 1e308, 0.5),
        *("", "x", "x" * 5000, "\ud800", "\0", "../../x", "{{ 1/0 }}", "\x1b]0;owned\x07"),
        *([], [None], [[1], {}], {}, {"a": {"b": [1]}}, json.loads(deep(900))),
    ]


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Replace the JSON in the file at `path` by what `change` makes of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def spoil_bytes(path: Path, chance: random.Random) -> str:
    """Cut, empty, turn or replace the bytes of the file at `path`; return what was done."""
    data = bytearray(path.read_bytes())
    how = chance.choice(("cut", "empty", "turned", "turned", "random", "longer", "a folder"))
    if how == "cut":
        data = data[: chance.randrange(len(data))]
    elif how == "empty":
        data = bytearray()
    elif how == "turned":
        for _ in range(chance.choice((1, 1, 20))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "random":
        data = bytearray(chance.randbytes(len(data)))
    elif how == "longer":
        data += chance.randbytes(100)
    path.unlink()
    path.mkdir() if how == "a folder" else path.write_bytes(data)
    return how


def make_base(base: Path) -> None:
    """Write the folder that each bad input gets a copy of."""
    from tests.models.test_gguf import write_gguf
    from tests.training.kills import config

    base.mkdir(parents=True)
    for name, numbers in (("chat", range(20)), ("held", range(100, 104))):
        lines = (json.dumps(_conversation(number)) + "\n" for number in numbers)
        (base / f"{name}.jsonl").write_text("".join(lines))
    tree = config(Path(), training={"max_steps": 4}, evaluation={"before": True})
    (base / "c.yaml").write_text(json.dumps({**tree, "output_dir": "new"}))
    answer = ["--prompt", "Hi", "--max-new-tokens", "2"]
    for arguments in (["train", "c.yaml", "output_dir=run"], ["generate", "run", *answer]):
        ended = import_what(arguments, base)
        assert ended.verdict == "fine", ended.output
    shutil.copytree(base / "run" / "model", base / "model")
    (base / "model" / ".finetune.json").unlink()
    write_gguf(base / "tiny.gguf")


def _conversation(number: int) -> dict[str, Any]:
    texts = (("user", f"What is {number} plus 3?"), ("assistant", f"It is {number + 3}."))
    return {"messages": [{"role": role, "content": content} for role, content in texts]}


def campaign(
    cases: Iterator[Bad], folder: Path, *, processes: int, say: Callable[[str], None]
) -> Counter[str]:
    """Try the cases, and return how they ended. `say` gets a line for each that ended badly."""
    found: Counter[str] = Counter()

    def one(numbered: tuple[int, Bad]) -> None:
        number, case = numbered
        here = folder / f"bad-{number}"
        shutil.copytree(folder / "base", here)
        try:
            case.spoil(here)
        except Exception as error:
            say(f"NOT TRIED {case.name}: {error!r}")
            found["not tried"] += 1
            return
        ended = run(case.arguments, here, log=folder / f"bad-{number}.log", environment=_own(here))
        outcome = "executed" if any(here.rglob(MARKER)) else ended.verdict
        if outcome == "fine" and case.refused:
            outcome = "accepted"
        found[outcome] += 1
        if outcome not in ("sentence", "fine"):
            say(f"{outcome.upper()} {case.name}: {' '.join(case.arguments)!r:.200}\n{_end(ended)}")
        elif outcome == "sentence":
            with (folder / "sentences.txt").open("a", errors="backslashreplace") as file:
                file.write(f"{case.name}: {ended.output.splitlines()[-1]}\n")
        else:
            with (folder / "fine.txt").open("a", errors="backslashreplace") as file:
                file.write(f"{case.name}: {case.arguments!r:.300}\n")
        shutil.rmtree(here, ignore_errors=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, enumerate(cases)))
    return found


def _own(here: Path) -> dict[str, str]:
    return {"FINETUNE_CACHE": str(here / "cache"), "HF_MODULES_CACHE": str(here / "modules")}


def _end(ended: Ended) -> str:
    return "\n".join(f"    {line:.200}" for line in ended.output.splitlines()[-6:])
