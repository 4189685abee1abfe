"""Which optimizer came out best, if any did, in sentences.

An optimizer wins if its interval on the test data has no point in common with that of any other.
Two 95 % intervals that do not touch are stricter than a difference at 95 %. With several rivals and
few seeds this is intended.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.comparison.statistics import LEVEL, Interval
from finetune.run.wording import listed


@dataclass(frozen=True)
class Verdict:
    """The winner, if there is one, the order of the optimizers, and both in words.

    `ranking` has those that never diverged, by mean test loss. `tied` has the best and those that
    overlap with it; it is empty if there is a winner.
    """

    winner: str | None
    ranking: list[str]
    tied: list[str]
    sentences: list[str]


def judge(tests: Mapping[str, Interval | None], diverged: Mapping[str, int]) -> Verdict:
    """Return the verdict on the optimizers.

    `tests` has the test loss of each, None if a run with one of the seeds diverged. `diverged` has
    how many runs of each did.
    """
    found = {name: test for name, test in tests.items() if test is not None}
    ranking = sorted(found, key=lambda name: found[name].mean)
    lost = [f"{name} ({diverged[name]} diverged)" for name in tests if name not in found]
    not_ranked = [f"Not ranked: {listed(lost)}."] if lost else []
    if not ranking:
        nobody = "No clear winner: every optimizer diverged with at least one seed."
        return Verdict(None, [], [], [nobody, *not_ranked])
    best = ranking[0]
    rivals = [name for name in ranking[1:] if found[best].overlaps(found[name])]
    beaten = [name for name in ranking[1:] if name not in rivals]
    if rivals:
        head = f"No clear winner: {best} has the lowest test loss, {_in_words(found[best])}, but "
        if found[best].low is None:
            head += "one seed says nothing about chance."
            return Verdict(None, ranking, ranking, [head, *not_ranked])
        intervals = f"interval{'s' * (len(rivals) > 1)} of {listed(rivals)}"
        head += f"the {LEVEL:.0%} {intervals} overlap{'s' * (len(rivals) == 1)} with it."
        tail = [f"Clearly behind {best}: {listed(beaten)}."] if beaten else []
        return Verdict(None, ranking, [best, *rivals], [head, *tail, *not_ranked])
    if not beaten:
        alone = f"{best} is the only one that never diverged: test loss {_in_words(found[best])}."
        return Verdict(best, ranking, [], [alone, *not_ranked])
    head = f"{best} wins: test loss {_in_words(found[best])}."
    next_best = (
        f"The next is {beaten[0]} with {_in_words(found[beaten[0]])}. "
        f"No {LEVEL:.0%} interval overlaps with the winner's."
    )
    return Verdict(best, ranking, [], [head, next_best, *not_ranked])


def _in_words(test: Interval) -> str:
    if test.low is None or test.high is None:
        return f"{test.mean:.3f}"
    return f"{test.mean:.3f} [{test.low:.3f}, {test.high:.3f}]"
