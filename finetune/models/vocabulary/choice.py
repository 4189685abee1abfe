"""Which rows of a token table a run trains, as it was chosen."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class VocabularyPlan:
    """What was chosen and what it saves."""

    mode: str  # full, active, sampled or frozen
    reason: str  # why, if `auto` chose; else empty
    ids: tuple[int, ...]  # tokens whose rows train; empty for full, and for frozen without new ones
    used: tuple[int, ...]  # tokens of the data, and others always in use, whichever rows train
    spare: int  # rows kept for tokens that turn up later in a stream
    rows: int  # of the table
    saved_bytes: int  # of gradients and optimizer state; negative with LoRA, which trains no row
    whole_input: bool  # the input table is one of its own, and trains whole, row by row
    num_sampled: int | None  # frozen rows drawn for a step; None: all take part

    def line(self) -> str:
        """Return one line for the log and the report, without a label."""
        why = f" ({self.reason})" if self.reason else ""
        count = len(self.used if self.mode == "full" else self.ids)
        rows = f"{count:,} of {self.rows:,} rows ({count / self.rows:.1%})"
        if self.mode == "full":
            return f"full{why}; the run uses {rows}"
        room = f", with room for {self.spare:,} that turn up later" if self.spare else ""
        table = "of the output table " if self.whole_input else ""
        drawn = f", {self.num_sampled:,} of which take part in a step" if self.num_sampled else ""
        rest = "; the input table trains whole, row by row" if self.whole_input else ""
        cost = "saved" if self.saved_bytes >= 0 else "for them, in addition to LoRA's"
        size = f"{abs(self.saved_bytes) / 1e6:,.0f} MB of gradients and optimizer state {cost}"
        trained = (
            f"{rows} train{room}, the others {table}stay" if count else "no row trains, all stay"
        )
        return f"{self.mode}{why}: {trained} bit for bit what they are{drawn}{rest}; {size}"

    def identity(self) -> str:
        """Return what a resumed run must share with the run it continues: mode and rows."""
        rows = f"{self.mode}, {len(self.ids)} rows"
        if not self.ids:
            return rows
        return f"{rows}, their ids hashed {hashlib.sha256(repr(self.ids).encode()).hexdigest()[:8]}"
