"""Records that cannot be used: all of them are listed at once, or dropped and counted."""

from dataclasses import dataclass, field

from finetune.errors import UserError

_LISTED = 20  # at most; the rest is counted


@dataclass
class BadRecords:
    """The records of some data that cannot be used, in the order in which they were met.

    `action` is "error" (`check` raises) or "drop".
    """

    action: str = "error"
    count: int = 0
    listed: list[str] = field(default_factory=list)  # where and why, of the first ones

    def __post_init__(self) -> None:
        assert self.action in ("error", "drop"), self.action

    def add(self, problem: str) -> None:
        """Note one more record: where it is, and what is wrong with it."""
        self.count += 1
        if len(self.listed) < _LISTED:
            self.listed.append(problem)

    def check(self) -> None:
        """Raise UserError with the list if there is a bad record and the action is "error"."""
        if self.action == "drop" or self.count == 0:
            return
        if self.count == 1:
            raise UserError(self.listed[0])
        raise UserError(
            f"{self.sentence()}. Mend them, or set data.on_bad_record=drop to go on without them"
        )

    def sentence(self) -> str:
        """Return how many records cannot be used, and the first of them."""
        more = self.count - len(self.listed)
        return (
            f"{self.count:,} record{'s' * (self.count != 1)} cannot be used: "
            + "; ".join(self.listed)
            + (f"; and {more:,} more" if more else "")
        )
