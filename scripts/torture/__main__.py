"""Runs that are killed, disks that refuse and inputs that bite: what the suite has no time for.

    python -m scripts.torture --minutes 10 --seed 0     (or: make torture MINUTES=10)

It prints a line for everything that went wrong, and at the end one line of figures. The time is
shared by kills, faults and bad inputs; counts can be given in its place.
"""

import argparse
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scripts.torture import bad_configs, bad_folders, faults, kills
from scripts.torture.bad_inputs import Bad, campaign, make_base
from scripts.torture.warm import warm

KINDS = {
    "configs": bad_configs.bad_configs,
    "arguments": bad_configs.bad_arguments,
    "data": bad_configs.bad_data,
    "models": bad_folders.bad_models,
    "ggufs": bad_folders.bad_ggufs,
    "checkpoints": bad_folders.bad_checkpoints,
    "runs": bad_folders.bad_runs,
}
SHARES = {"kills": 0.5, "faults": 0.1, "bad inputs": 0.4}  # of the time


def bad_inputs(seed: int, kinds: list[str]) -> Iterator[Bad]:
    """Yield bad inputs of each kind in turn, without end."""
    drawn = [KINDS[kind](random.Random(f"{seed} {kind}")) for kind in kinds]
    return itertools.chain.from_iterable(zip(*drawn))


def until(end: float, items: Iterator[Bad]) -> Iterator[Bad]:
    """Yield the items until that time."""
    return itertools.takewhile(lambda item: time.monotonic() < end, items)


def say(text: str) -> None:
    """Print a line at once."""
    print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, help="how many, in place of a share of the time")
    parser.add_argument("--variants", default="", help="of killed runs, such as dense,lora")
    parser.add_argument("--faults", type=int)
    parser.add_argument("--bad-inputs", type=int)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of bad inputs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where; it must not exist")
    options = parser.parse_args()
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-", dir=memory))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    warm()
    make_base(folder / "base")
    many, workers = 10**9, options.processes
    end = time.monotonic() + 60 * options.minutes * SHARES["kills"]

    wanted = many if options.kills is None else options.kills
    killed: Counter[str] = Counter()
    if wanted:
        for count in kills.campaign(
            folder / "base",
            options.seed,
            names=[name for name in options.variants.split(",") if name],
            kills=wanted,
            processes=workers,
            say=say,
        ):
            killed = count
            if options.kills is None and time.monotonic() > end:
                break
    say(f"kills: {dict(killed)}")

    end = time.monotonic() + 60 * options.minutes * SHARES["faults"]
    wanted = many if options.faults is None else options.faults
    failed: Counter[str] = Counter()
    if wanted:
        for count in faults.campaign(folder / "base", options.seed, faults=wanted, say=say):
            failed = count
            if options.faults is None and time.monotonic() > end:
                break
    say(f"faults: {dict(failed)}")

    end = time.monotonic() + 60 * options.minutes * SHARES["bad inputs"]
    cases = bad_inputs(options.seed, options.kinds.split(","))
    if options.bad_inputs is not None:
        cases, end = itertools.islice(cases, options.bad_inputs), float("inf")
    tried = campaign(until(end, cases), folder, processes=workers, say=say)
    say(f"bad inputs: {dict(tried)}")

    say(
        f"seed {options.seed}: {killed['kills']} kills in {killed['chains']} chains, "
        f"{killed['lost']} lost; {failed['faults']} faults, {failed['bad']} not as they should be; "
        f"{tried.total()} bad inputs: {tried['sentence']} a sentence, {tried['fine']} accepted as "
        f"they may be, {tried['traceback']} tracebacks, {tried['executed']} executed, "
        f"{tried.total() - tried['sentence'] - tried['fine'] - tried['traceback']} other"
    )
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
