"""Disks that refuse, files that turn, and signals: each has to end in a sentence, and be resumed.

After each fault `--resume auto` has to end in what an uninterrupted run leaves, bit for bit.
"""

import errno
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.torture.bad_inputs import spoil_bytes
from scripts.torture.kills import Chains, left, variants
from scripts.torture.warm import TRACEBACK
from tests.training.kills import Operations

ERRORS = (
    *("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EMFILE", "ESTALE", "EBUSY"),
    *("ENOENT", "ENAMETOOLONG"),
)


class Refusing(Operations):
    """The operations of this process below a folder, of which the n-th fails."""

    def __init__(self, root: Path, number: int, code: int) -> None:
        self.number, self.code = number, code
        super().__init__(root)

    def _count(self, what: str, place: str, *, appended: bool = False) -> None:
        before = len(self.points)
        super()._count(what, place, appended=appended)
        if len(self.points) > before and before == self.number:
            raise OSError(self.code, os.strerror(self.code), place)


class Faults:
    """The faults of one small run."""

    def __init__(self, folder: Path) -> None:
        tree = variants(folder)["dense"]
        self.chains = Chains("faults", tree, folder)
        self.chains.begin()
        self.folder = folder

    def one(self, number: int, chance: random.Random) -> tuple[str, str | None]:
        """Have one fault, and resume; return what it was, and what is wrong or None."""
        kind = chance.choice((self._refused, self._refused, self._full, self._turned, self._signal))
        run = self.folder / f"fault-{number}"
        name, before, codes = kind(run, chance)
        (ended,) = self.chains._run(run, before)
        problem = None
        if TRACEBACK in ended.output or ended.code not in codes:
            problem = f"it ends with {ended.code}: {ended.output[-600:]}"
        elif ended.code == 2 and "\nfinetune: " not in "\n" + ended.output:
            problem = f"there is no sentence: {ended.output[-600:]}"
        else:
            (ended,) = self.chains._run(run, lambda: None)
            found, wanted = (
                left(each) if each.is_dir() else {} for each in (run, self.chains.whole)
            )
            different = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
            if ended.code != 0:
                problem = f"the resumed run ends with {ended.code}: {ended.output[-600:]}"
            elif different:
                problem = f"after the resume these differ: {sorted(different)[:8]}"
        shutil.rmtree(run, ignore_errors=True)
        return name, problem

    def _refused(self, run: Path, chance: random.Random) -> tuple[str, Any, set[int]]:
        code, number = chance.choice(ERRORS), chance.randrange(self.chains.points)
        return (
            f"{code} at operation {number}",
            lambda: (Refusing(run, number, getattr(errno, code)), None)[1],
            {0, 2},
        )

    def _full(self, run: Path, chance: random.Random) -> tuple[str, Any, set[int]]:
        size = chance.choice((100, 1000, 5000, 20_000, 60_000))

        def before() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            log = os.fstat(1).st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + log, size + log))

        return f"no file over {size} bytes", before, {0, 2}

    def _turned(self, run: Path, chance: random.Random) -> tuple[str, Any, set[int]]:
        """Spoil a file of the newest checkpoint of the finished run, and go on."""
        shutil.copytree(self.chains.whole, run)
        newest = sorted((run / "checkpoints").iterdir())[-1]
        file = chance.choice(sorted(path for path in newest.iterdir() if path.suffix == ".pt"))
        how = spoil_bytes(file, chance)
        return f"{file.name} {how}", lambda: None, {0}

    def _signal(self, run: Path, chance: random.Random) -> tuple[str, Any, set[int]]:
        number, name = chance.randrange(self.chains.points), chance.choice(("SIGINT", "SIGTERM"))

        def before() -> None:
            class Signalled(Refusing):
                def _count(self, what: str, place: str, *, appended: bool = False) -> None:
                    reached = len(self.points)
                    Operations._count(self, what, place, appended=appended)
                    if len(self.points) > reached == number:
                        os.kill(os.getpid(), getattr(signal, name))

            Signalled(run, number, 0)

        return f"{name} at operation {number}", before, {0, 130, -15}


def campaign(
    folder: Path, seed: int, *, faults: int, say: Callable[[str], None]
) -> Iterator[Counter[str]]:
    """Yield the counts after each fault, until there are `faults`."""
    made, count = Faults(folder), Counter[str]()
    while count["faults"] < faults:
        name, problem = made.one(count["faults"], random.Random(f"{seed} {count['faults']}"))
        count["faults"] += 1
        if problem is not None:
            count["bad"] += 1
            say(f"FAULT {name}: {problem}")
        yield count


assert sys.platform == "linux"
