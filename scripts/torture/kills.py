"""Runs of every kind that are killed, resumed, killed again, and compared with one that was not.

A kill comes before a file operation that is drawn, or after a time that is drawn. A chain is a run
that is killed a few times and then ends; what it leaves must be, bit for bit, what an uninterrupted
run leaves.
"""

import json
import os
import random
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.torture.warm import Ended, import_what, kill_group, start, wait
from tests.conftest import PYTHIA
from tests.training.kills import KILLED, Operations, Point, config, without_time

MOST_KILLS = 6  # in a chain
TIMED = {"environment.json", "README.md", "protocol.yaml"}  # hold times, or a command
FOUND_AGAIN = {"report.html", "study.db", "tune.db"}  # these hold times too
FOUND_AGAIN |= {"comparison.html", "comparison.json", "comparison.csv"}


def variants(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configs by name. Each run takes a second or two."""
    saved = {"every": 3, "keep": 2}
    often = {"every": 2, "samples": 1, "generate": 0}
    eight = {"max_steps": 8}
    held_lr = {"training": {**eight, "divergence_threshold": 1e9}, "optimizer": {"lr": 1.0}}
    untied = {"model": {"config": PYTHIA | {"num_hidden_layers": 1, "hidden_dropout": 0.1}}}
    trees = {
        "dense": config(folder, training=eight, checkpoint=saved, evaluation=often),
        "stream": config(
            folder, data={"streaming": True, "shuffle_buffer": 16}, training=eight, checkpoint=saved
        ),
        "lora": config(
            folder,
            model={"lora": {"rank": 2, "dropout": 0.1}},
            data={"packing": False},
            training=eight,
            checkpoint=saved,
        ),
        "lazy": config(
            folder, **untied, optimizer={"name": "lazy_adamw"}, training=eight, checkpoint=saved
        ),
        "sampled": config(
            folder,
            vocabulary={"mode": "sampled", "num_sampled": 8},
            training=eight,
            checkpoint=saved,
        ),
        "early": config(
            folder, **held_lr, evaluation={"every": 1, "early_stopping_patience": 2, "samples": 1}
        ),
        "two processes": config(folder, training={"max_steps": 5}, checkpoint={"every": 2}),
        "compare": config(folder, training={"max_steps": 3}, evaluation={"generate": 0}),
    }
    trees["compare"]["data"]["test"] = str(folder / "held.jsonl")
    return trees


class Chains:
    """The chains of kills of one variant."""

    def __init__(self, name: str, tree: dict[str, Any], folder: Path) -> None:
        self.name, self.folder = name, folder
        self.file = folder / f"{name.replace(' ', '-')}.yaml"
        self.file.write_text(json.dumps(tree))
        self.whole = folder / f"{self.file.stem}-whole"
        self.points, self.seconds = 0, 0.0

    def begin(self) -> None:
        """Make the run that nobody kills, and count its file operations."""
        counted = self.folder / f"{self.file.stem}.count"

        def count() -> Callable[[], None]:
            heard = Operations(self.whole)
            return lambda: (counted.write_text(str(len(heard.points))), None)[1]

        if self.name != "two processes":
            first = import_what(self._arguments(self.whole), self.folder)
            assert first.verdict == "fine", (self.name, first.output)
            shutil.rmtree(self.whole)
        ended = self._run(self.whole, count if self.name != "two processes" else lambda: None)
        assert ended[0].verdict == "fine", (self.name, ended[0].output)
        self.points = int(counted.read_text()) if counted.exists() else 0
        self.seconds = ended[0].seconds
        self.wanted = left(self.whole)

    def chain(self, number: int, chance: random.Random) -> tuple[int, str | None]:
        """Kill a run a few times, and let it end; return the kills, and what is wrong or None."""
        run = self.folder / f"{self.file.stem}-{number}"
        kills, said, wanted = 0, [], chance.randint(1, MOST_KILLS)
        for _ in range(3 * MOST_KILLS):
            if kills == wanted:
                break
            by_point = self.points and chance.random() < 0.6
            if by_point:
                torn = chance.random() < 0.3
                point = Point(chance.randrange(self.points), "", torn=torn)
                ended = self._run(run, lambda p=point: (Operations(run, p), None)[1])
                said.append(f"at operation {point.number}{' torn' * torn}: {ended[0].code}")
            else:
                after = chance.uniform(0.0, 1.1 * self.seconds)
                ended = self._run(run, lambda: None, kill_after=after, chance=chance)
                said.append(f"after {after:.2f} s: {[each.code for each in ended]}")
            codes = {each.code for each in ended}
            if codes & {KILLED, -9}:
                kills += 1
            elif codes == {0}:
                break
            else:
                return kills, f"{said}: {ended[0].output[-800:]}"
        ended = self._run(run, lambda: None)
        if {each.code for each in ended} != {0}:
            return kills, f"{said}, then the resumed run ends with {ended[0].output[-800:]}"
        found = left(run)
        different = sorted(
            key for key in found.keys() | self.wanted if found.get(key) != self.wanted.get(key)
        )
        shutil.rmtree(run, ignore_errors=True)
        return kills, f"{said}, then these differ: {different[:8]}" if different else None

    def _arguments(self, run: Path) -> list[str]:
        folder = f"output_dir={run}"
        if self.name == "compare":
            few = ["--trials", "2", "--seeds", "1", "optimizer.name=[sgd, adamw]"]
            return ["compare", str(self.file), folder, *few]
        return ["train", str(self.file), folder, "--resume", "auto"]

    def _run(
        self,
        run: Path,
        before: Callable[[], Callable[[], None] | None],
        *,
        kill_after: float | None = None,
        chance: random.Random | None = None,
    ) -> list[Ended]:
        arguments = self._arguments(run)
        count = 2 if self.name == "two processes" else 1
        environments = [_rank(number, count) for number in range(count)]
        port = _free_port()
        logs = [self.folder / f"{run.name}-{number}.log" for number in range(count)]
        pids = [
            start(
                arguments,
                self.folder,
                log=log,
                before=before,
                environment={**environment, **({"MASTER_PORT": port} if count > 1 else {})},
            )
            for environment, log in zip(environments, logs)
        ]
        if kill_after is not None and chance is not None:
            time.sleep(kill_after)
            chance.shuffle(pids) if count == 1 else None
            victims = pids if count == 1 else chance.choice((pids, pids[:1], pids[1:]))
            for pid in victims:
                kill_group(pid)
            if count > 1:  # a launcher ends the others then
                time.sleep(chance.uniform(0, 0.5))
                for pid in pids:
                    kill_group(pid)
        return [wait(pid, log, timeout=240) for pid, log in zip(pids, logs)]


def _rank(number: int, count: int) -> dict[str, str]:
    if count == 1:
        return {}
    ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {key: str(value) for key, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def left(run: Path) -> dict[str, Any]:
    """Return what a run has left, without times. Each file is a key, so that none may be added."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if path.name in TIMED or path.name == ".finetune.lock":
            found[name] = True
        elif path.name in FOUND_AGAIN:
            found[name] = path.stat().st_size > 0
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            found[name] = without_time([json.loads(line) for line in lines])
        elif path.suffix == ".json" and "model" not in path.parts:
            found[name] = without_time(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".yaml":
            found[name] = path.read_text().replace(str(run), "RUN")
        else:
            found[name] = path.read_bytes()
    return found


def campaign(
    folder: Path,
    seed: int,
    *,
    names: list[str],
    kills: int,
    processes: int,
    say: Callable[[str], None],
) -> Iterator[Counter[str]]:
    """Yield the counts of kills and of chains, chain after chain, until there are `kills`.

    The variants of these `names` take turns, all if there are none. `say` gets a line for each
    chain that does not end as it should.
    """
    trees = variants(folder)
    made = [Chains(name, trees[name], folder) for name in names or trees]
    with ThreadPoolExecutor(processes) as pool:
        for chains in made:
            chains.begin()
        count: Counter[str] = Counter()
        number = 0
        while count["kills"] < kills:
            turns = [made[(number + turn) % len(made)] for turn in range(processes)]
            draws = [random.Random(f"{seed} {number + turn}") for turn in range(processes)]
            done = list(pool.map(Chains.chain, turns, range(number, number + processes), draws))
            for chains, (kills_here, wrong) in zip(turns, done):
                count["kills"] += kills_here
                count[f"kills of {chains.name}"] += kills_here
                count["chains"] += 1
                count["lost"] += wrong is not None
                if wrong is not None:
                    say(f"LOST {chains.name}: {wrong}")
            number += processes
            yield count


assert os.name == "posix"
