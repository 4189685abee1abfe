"""Runs that are killed, disks that refuse and inputs that bite: what the suite has no time for.

    python -m scripts.torture --minutes 10 --seed 0     (or: make torture MINUTES=10)

It prints one line for everything that went wrong, and at the end one line of figures.
"""

import argparse
import itertools
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.torture.bad_inputs import Bad, campaign, make_base
from scripts.torture.warm import warm


def bad_inputs(seed: int) -> Iterator[Bad]:
    """Yield bad inputs of each kind in turn, without end."""
    from scripts.torture import bad_configs, bad_folders

    kinds = (
        *(bad_configs.bad_configs, bad_configs.bad_arguments, bad_configs.bad_data),
        *(bad_folders.bad_models, bad_folders.bad_models, bad_folders.bad_ggufs),
        *(bad_folders.bad_checkpoints, bad_folders.bad_runs),
    )
    drawn = [kind(random.Random(f"{seed} {number}")) for number, kind in enumerate(kinds)]
    return itertools.chain.from_iterable(zip(*drawn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bad-inputs", type=int, help="how many, in place of as time allows")
    parser.add_argument("--only", default="", help="bad inputs with this in their names")
    parser.add_argument("--folder", type=Path, help="where; it must not exist")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    warm()

    def say(text: str) -> None:
        print(text, flush=True)

    make_base(folder / "base")
    cases = (bad for bad in bad_inputs(options.seed) if options.only in bad.name)
    found = campaign(
        itertools.islice(cases, options.bad_inputs), folder, processes=os.cpu_count() or 1, say=say
    )
    say(f"bad inputs {found.total()}: {dict(found)}")


if __name__ == "__main__":
    sys.exit(main())
