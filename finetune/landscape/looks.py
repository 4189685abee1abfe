"""What tells one descent from another: colour, dashes and marker together.

Floor 1.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    colour: str  # Okabe and Ito's, without the yellow
    dashes: tuple[float, ...]  # drawn and left out, in points; () is a whole line
    marker: str  # matplotlib's letter


LOOKS = (
    Look("#0072b2", (), "o"),
    Look("#d55e00", (7, 2.5), "s"),
    Look("#009e73", (2, 2), "^"),
    Look("#cc79a7", (8, 2, 2, 2), "D"),
    Look("#000000", (4, 2), "v"),
    Look("#e69f00", (), "X"),
    Look("#56b4e9", (6, 2, 1, 2, 1, 2), "P"),
)
