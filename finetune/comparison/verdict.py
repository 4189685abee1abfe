"""Which optimizer came out best, if any did, in sentences.

Floor 1. An optimizer wins if its interval on the test data has no point in common with that of any other. That two 95 % intervals
do not touch asks for more than a difference at 95 %; with several rivals and few seeds that is as it should be.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.comparison.statistics import LEVEL, Interval
from finetune.run.wording import listed


@dataclass(frozen=True)
class Verdict:
    """`ranking`: those that never diverged, by mean test loss; `tied`: the best and whoever overlaps with it, where nobody wins."""

    winner: str | None
    ranking: list[str]
    tied: list[str]
    sentences: list[str]


def judge(tests: Mapping[str, Interval | None], diverged: Mapping[str, int]) -> Verdict:
    """`tests`: the test loss of each optimizer, None where a run with one of the seeds diverged; `diverged`: how many did."""
    found = {name: test for name, test in tests.items() if test is not None}
    ranking = sorted(found, key=lambda name: found[name].mean)
    lost = [name for name in tests if name not in found]
    said = (
        [f"Not ranked: {listed([f'{name} ({diverged[name]} diverged)' for name in lost])}."]
        if lost
        else []
    )
    if not ranking:
        return Verdict(
            None,
            [],
            [],
            ["No clear winner: every optimizer diverged with at least one seed.", *said],
        )
    best = ranking[0]
    rivals = [name for name in ranking[1:] if found[best].overlaps(found[name])]
    beaten = [name for name in ranking[1:] if name not in rivals]
    if rivals:
        if found[best].low is None:
            head = f"No clear winner: {best} has the lowest test loss, {_said(found[best])}, but one seed says nothing about chance."
            return Verdict(None, ranking, ranking, [head, *said])
        head = (
            f"No clear winner: {best} has the lowest test loss, {_said(found[best])}, "
            f"but the {LEVEL:.0%} interval{'s' * (len(rivals) > 1)} of {listed(rivals)} overlap{'s' * (len(rivals) == 1)} with it."
        )
        tail = [f"Clearly behind {best}: {listed(beaten)}."] if beaten else []
        return Verdict(None, ranking, [best, *rivals], [head, *tail, *said])
    if not beaten:
        return Verdict(
            best,
            ranking,
            [],
            [f"{best} is the only one that never diverged: test loss {_said(found[best])}.", *said],
        )
    head = (
        f"{best} wins: test loss {_said(found[best])}; {beaten[0]}, the next, has {_said(found[beaten[0]])}, "
        f"and no {LEVEL:.0%} interval overlaps with the winner's."
    )
    return Verdict(best, ranking, [], [head, *said])


def _said(test: Interval) -> str:
    if test.low is None or test.high is None:
        return f"{test.mean:.3f}"
    return f"{test.mean:.3f} [{test.low:.3f}, {test.high:.3f}]"
