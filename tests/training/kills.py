"""Runs that are killed at every file operation, each in a child forked from one warm process.

    python -m tests.training.kills FOLDER

An operation is a file that is opened for writing, renamed or deleted, or a folder that is made or
deleted, if it is in the run's folder. Python announces them to an audit hook
(https://docs.python.org/3/library/audit_events.html). An fsync is none: after a kill, unlike after
a power cut, the system still has what it was given, so the files before and after it are the same.

A child is ended by os._exit just before its n-th operation, so that what Python has not yet handed
to the system is lost, as in a kill. A file that is opened also gets half a line before the end.

The script prints one line of JSON for each scenario: the number of points, and what went wrong.
"""

import builtins
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

from tests.conftest import LLAMA, conversation

KILLED, TORN = 77, b'{"step": 3, "loss": 5.1, "prom'
PATHS = {  # audit event -> which of its arguments are a path and its folder's descriptor
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
}


@dataclass(frozen=True)
class Point:
    """The n-th operation of a run."""

    number: int
    what: str
    torn: bool = False  # the file is opened, and half a line is written


class Operations:
    """The operations of this process below `root`. It ends at `last`, if that is given."""

    def __init__(self, root: Path, last: Point | None = None) -> None:
        self.root, self.last = str(root), last
        self.points: list[Point] = []
        self._busy = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open":
            path, mode, flags = arguments
            writing = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if writing and isinstance(path, str | bytes | os.PathLike):
                self._count("open", self._place(path, -1), appended="a" in (mode or ""))
        elif event in PATHS:
            places = [self._place(arguments[i], arguments[j]) for i, j in PATHS[event]]
            inside = [place for place in places if place.startswith(self.root)]
            self._count(event, inside[-1] if inside else "")

    def _place(self, path: Any, descriptor: int) -> str:
        name = os.fsdecode(path)
        folder = os.getcwd() if descriptor == -1 else os.readlink(f"/proc/self/fd/{descriptor}")
        return os.path.normpath(os.path.join(folder, name))

    def _count(self, what: str, place: str, *, appended: bool = False) -> None:
        if not place.startswith(self.root):
            return
        point = Point(len(self.points), f"{what} {os.path.relpath(place, self.root)}")
        self.points.append(point)
        if self.last is not None and point.number == self.last.number:
            if self.last.torn and what == "open":
                self._busy = True
                with builtins.open(place, "ab" if appended else "wb", buffering=0) as file:
                    file.write(TORN)
            os._exit(KILLED)


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a config of a tiny run whose every step is saved."""
    tree: dict[str, Any] = {
        "model": {"config": LLAMA | {"num_hidden_layers": 1}, "tokenizer": {"vocab_size": 280}},
        "data": {
            "train": str(folder / "chat.jsonl"),
            "validation": str(folder / "held.jsonl"),
            "max_length": 64,
        },
        "optimizer": {"lr": 3e-3},
        "training": {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
        "checkpoint": {"every": 1, "keep": 2},
        "evaluation": {"every": 2, "samples": 1, "generate": 0},
        "generation": {"max_new_tokens": 2},
    }
    for name, section in changes.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """Call `work` in a child; return its exit code, and what it returned or its traceback."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            said, code = work(), 0
        except BaseException:
            said = traceback.format_exc()
        try:
            os.close(ours)
            with os.fdopen(theirs, "w") as pipe:
                json.dump(said, pipe)
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(said or "null")


def train(tree: dict[str, Any], run: Path, resume: str | None) -> str:
    """Train in this process. The report is empty: drawing it takes longer than all the rest."""
    from finetune.config.loading import make_config
    from finetune.display import Display
    from finetune.recipes.train.train import run_training
    from finetune.report import run_page

    run_page._render = lambda records, live: "<html></html>\n"
    return run_training(
        make_config({**tree, "output_dir": str(run)}),
        resume=resume,
        display=Display(enabled=False),
    )


def kept(run: Path) -> dict[str, Any]:
    """Return what must be the same in a run that was killed and in one that was not."""

    def lines(name: str) -> list[Any]:
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    found: dict[str, Any] = {
        name: without_time(json.loads((run / name).read_text()))
        for name in ("evaluation.json", "data.json", "vocabulary.json", ".finetune.json")
    }
    found |= {name: without_time(lines(name)) for name in ("metrics.jsonl", "samples.jsonl")}
    for path in sorted([*(run / "model").rglob("*"), *(run / "checkpoints").rglob("*")]):
        if path.is_file() and path.name != "README.md":
            found[str(path.relative_to(run))] = path.read_bytes()
    found["whole"] = [(run / name).read_text()[-8:-1] for name in ("report.html",)]
    found["names"] = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    return found


def without_time(tree: Any) -> Any:
    if isinstance(tree, list):
        return [without_time(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    timed = ("seconds", "tokens_per_second", "load")
    return {key: without_time(value) for key, value in tree.items() if key not in timed}


@dataclass(frozen=True)
class Scenario:
    """A run that is begun in a copy of the folder `begun`, and ends as that in `whole`."""

    name: str
    tree: dict[str, Any]
    whole: Path
    begun: Path | None = None
    resume: str | None = None  # "{}" is the run's folder

    def begin(self, run: Path) -> str | None:
        """Make the folder to begin with, and return what `--resume` is given."""
        if self.begun is not None:
            copytree(self.begun, run)
        return self.resume and self.resume.format(run)

    def points(self, run: Path) -> list[Point]:
        """Train, and return the points at which a run may be killed."""
        resume = self.begin(run)

        def work() -> list[tuple[int, str]]:
            heard = Operations(run)
            train(self.tree, run, resume)
            return [(point.number, point.what) for point in heard.points]

        code, said = forked(work)
        assert code == 0, said
        points = [Point(number, what) for number, what in said]
        return points + [Point(p.number, p.what, torn=True) for p in points if p.what[:4] == "open"]

    def problem(self, point: Point, run: Path, wanted: dict[str, Any]) -> str | None:
        """Kill a run at `point` and resume it. Return what is wrong with it then, or None."""
        resume = self.begin(run)
        code, said = forked(lambda: (Operations(run, point), train(self.tree, run, resume))[1])
        if code != KILLED:
            return f"{point} was not met: {code} {said}"
        code, said = forked(lambda: train(self.tree, run, "auto"))
        if code != 0:
            return f"after {point} the resumed run ends with {said}"
        found = kept(run)
        different = [key for key in found.keys() | wanted if found.get(key) != wanted.get(key)]
        rmtree(run)
        return f"after {point} these differ: {sorted(different)}" if different else None


def scenarios(folder: Path) -> Iterator[Scenario]:
    tree = config(
        folder,
        training={"max_steps": 9},
        optimizer={"lr": 1.0},
        evaluation={"every": 1, "early_stopping_patience": 1},
    )
    assert forked(lambda: train(tree, folder / "early", None)) == (0, "early stopping")
    yield Scenario("a run that stops early", tree, folder / "early")
    tree, many = config(folder), folder / "many"
    assert forked(lambda: train(tree, many, None)) == (0, "finished")
    back = f"{{}}/checkpoints/{'step-00000001'}"
    yield Scenario("a finished run that goes back", tree, many, many, back)


def main(folder: Path) -> None:
    for name, numbers in (("chat", range(20)), ("held", range(100, 104))):
        lines = (json.dumps(conversation(number)) + "\n" for number in numbers)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    train(config(folder), folder / "first", None)  # here: the children find every cache filled
    os.fsync = lambda file: None
    gc.collect()
    gc.freeze()  # so that the children share these pages
    gc.disable()
    for scenario in scenarios(folder):
        points, wanted = scenario.points(folder / "counted"), kept(scenario.whole)
        rmtree(folder / "counted")

        def one(number: int, scenario=scenario, points=points, wanted=wanted) -> str | None:
            return scenario.problem(points[number], folder / f"run-{number}", wanted)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            wrong = [said for said in pool.map(one, range(len(points))) if said is not None]
        said = {"scenario": scenario.name, "points": len(points), "wrong": wrong}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401

    main(Path(sys.argv[1]))
