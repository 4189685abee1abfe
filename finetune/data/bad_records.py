"""Records that cannot be used: all of them are listed at once, or dropped and counted."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from finetune.errors import UserError

_LISTED = 20  # at most; the rest is counted
_NUMBERS = re.compile(r"\d+")


class UnusableRecords(UserError):
    """Records that cannot be used and are not to be dropped; `bad` has the list."""

    def __init__(self, message: str, bad: "BadRecords") -> None:
        super().__init__(message)
        self.bad = bad


@dataclass
class BadRecords:
    """The records of some data that cannot be used, in the order in which they were met.

    `action` is "error" (`check` raises) or "drop".
    """

    action: str = "error"
    count: int = 0
    listed: dict[str, list[str]] = field(default_factory=dict)  # what is wrong -> where, the first
    kinds: dict[str, str] = field(
        default_factory=dict
    )  # what is wrong but for details -> the first

    def __post_init__(self) -> None:
        assert self.action in ("error", "drop"), self.action

    def add(self, where: str, problem: str) -> None:
        """Note one more record. `problem` goes on after `where`, as ": it is empty" does."""
        self.count += 1
        if self.count <= _LISTED:
            first = self.kinds.setdefault(_NUMBERS.sub("", problem)[:40], problem)
            self.listed.setdefault(first, []).append(where)

    def forget(self) -> None:
        """Begin anew, without a record."""
        self.count = 0
        self.listed.clear()
        self.kinds.clear()

    def check(self) -> None:
        """Raise UnusableRecords with the list, if there is one and records are not dropped."""
        if self.action == "drop" or self.count == 0:
            return
        first = next(iter(self.listed))
        if self.count == 1:
            raise UnusableRecords(self.listed[first][0] + first, self)
        _, _, own = first.partition(". ")  # what to do, if all have the same problem
        remedy = "Mend them, or set data.on_bad_record=drop to go on without them"
        if own and len(self.listed) == 1:
            remedy = own
        raise UnusableRecords(f"{self.sentence()}. {remedy}", self)

    def sentence(self) -> str:
        """Return how many records cannot be used, and where the first of them are."""
        listed = [
            _listed(places) + _said_of(len(places), problem.split(". ")[0])  # not what to do
            for problem, places in self.listed.items()
        ]
        more = self.count - sum(map(len, self.listed.values()))
        return (
            f"{self.count:,} record{'s' * (self.count != 1)} cannot be used: {'; '.join(listed)}"
            + (f"; and {more:,} more" if more else "")
        )


def _said_of(count: int, problem: str) -> str:
    """Return the problem of so many lines: one line "has", two "have"."""
    for one, many in (("has ", "have "), ("repeats ", "repeat "), ("is ", "are ")):
        if count > 1 and problem.lstrip().startswith(one):
            return problem.replace(one, many, 1)
    return problem


def _listed(places: Iterable[str]) -> str:
    """Return places as a list, in which a file is named once: "a.jsonl lines 2, 5"."""
    found: list[str] = []
    by_file: dict[str, list[str]] = {}
    for place in dict.fromkeys(places):
        by_file.setdefault(place.rpartition(" line ")[0], []).append(place)
    for file, same in by_file.items():
        numbers = [place.rpartition(" ")[2] for place in same]
        numbers.sort(key=lambda number: (len(number), number))
        found += [f"{file} lines {', '.join(numbers)}"] if file and len(same) > 1 else same
    return ", ".join(found)
