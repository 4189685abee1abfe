"""What every script here ends with: a claim of the literature, what was measured, and a verdict."""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence

import torch

# Models this small gain nothing from threads, and lose much if cores are busy.
torch.set_num_threads(1)

VERDICTS = ("reproduced", "reproduced in part", "not reproduced")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One section of docs/claims.md."""

    title: str
    source: str  # authors, year, where in the paper
    url: str
    claim: str  # what the source says
    setting: str  # data, model, budget, how the learning rate was chosen
    seeds: str  # which, and what the ± is
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    verdict: str  # one of VERDICTS
    because: str
    checks: dict[str, float]  # the figures that the verdict rests on

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, self.verdict

    def table(self) -> str:
        """Return the figures as a Markdown table."""
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """Return `mean ± standard deviation` over seeds.

    "diverged 1/3" comes first if a value is not finite.
    """
    finite = [value for value in values if math.isfinite(value)]
    lost = len(values) - len(finite)
    diverged = f"diverged {lost}/{len(values)} " if lost else ""
    if not finite:
        return diverged.strip()
    deviation = f" ± {statistics.stdev(finite):.{digits}f}" if len(finite) > 1 else ""
    return f"{diverged}{statistics.mean(finite):.{digits}f}{deviation}"


def present(claim: Claim) -> None:
    """Print the claim, the table, the verdict, and one line of JSON."""
    print(f"{claim.title}\n{claim.claim} ({claim.source}, {claim.url})")
    print(f"{claim.setting}; {claim.seeds}\n\n{claim.table()}\n")
    print(f"verdict: {claim.verdict}: {claim.because}")
    print(json.dumps(dataclasses.asdict(claim), ensure_ascii=False), flush=True)


def main(reproduce: Callable[[bool], Claim]) -> None:
    """Run the command line of one script."""
    parser = argparse.ArgumentParser(description=reproduce.__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a smaller setting, for a look and for the tests"
    )
    present(reproduce(parser.parse_args().quick))
