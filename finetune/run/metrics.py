"""The figures of an evaluation: the key in the record, the name, the unit and the digits of each.

The terminal, the report, the model card and the demo all print from `METRICS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MISSING = "–"


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation and how it is shown."""

    key: str
    name: str  # in a table
    unit: str
    digits: int  # after the point
    short: str = ""  # on a line of the terminal; "" leaves it out there
    higher_is_better: bool = False
    is_share: bool = False  # recorded from 0 to 1, shown in percent
    about_vocabulary: bool = False  # the report has it in a part of its own, without a tile

    def value(self, metrics: Mapping[str, Any] | None) -> float | None:
        """Return the value in `metrics`, in the unit that is shown; None if it was not measured."""
        value = number(metrics, self.key)
        return 100 * value if value is not None and self.is_share else value

    def show(self, metrics: Mapping[str, Any] | None) -> str:
        """Return the value in `metrics`, rounded; a dash if it was not measured."""
        value = self.value(metrics)
        return MISSING if value is None else f"{value:,.{self.digits}f}"


METRICS = (
    Metric("loss", "Held-out loss", "nats per target token", 3, short="loss"),
    Metric("perplexity", "Perplexity", "exp of the loss", 2, short="perplexity"),
    Metric("bits_per_byte", "Bits per byte", "of the target text", 3),
    Metric("chrf", "chrF", "0 to 100", 1, short="chrF", higher_is_better=True),
    Metric("bleu", "BLEU", "0 to 100", 1, short="BLEU", higher_is_better=True),
    Metric(
        "tool_calls_parsed",
        "Calls that parse, %",
        "of the answers that should call a tool",
        1,
        short="calls parse",
        higher_is_better=True,
        is_share=True,
    ),
    Metric(
        "tool_calls_equal",
        "Calls as in the data, %",
        "of the answers that should call a tool: equal names and arguments",
        1,
        short="calls equal",
        higher_is_better=True,
        is_share=True,
    ),
    Metric("active_tokens", "Active tokens", "tokens that the run uses", 0, about_vocabulary=True),
    Metric(
        "loss_inside",
        "Active loss",
        "nats per target token that is active",
        3,
        about_vocabulary=True,
    ),
    Metric(
        "loss_outside",
        "Inactive loss",
        "nats per target token that is not",
        3,
        about_vocabulary=True,
    ),
    Metric(
        "share_outside",
        "Inactive targets, %",
        "of the target tokens",
        2,
        is_share=True,
        about_vocabulary=True,
    ),
    Metric(
        "inactive_mass",
        "Inactive mass, %",
        "of the probability",
        2,
        is_share=True,
        about_vocabulary=True,
    ),
    Metric(
        "inactive_mass_p99",
        "Inactive mass, %, p99",
        "of the probability",
        1,
        is_share=True,
        about_vocabulary=True,
    ),
    Metric(
        "generated_outside",
        "Inactive answers, %",
        "of the tokens generated",
        2,
        is_share=True,
        about_vocabulary=True,
    ),
    Metric(
        "unrelated_loss",
        "Unrelated loss",
        "nats per token of other text",
        3,
        short="unrelated loss",
    ),
)


def number(metrics: Mapping[str, Any] | None, key: str) -> float | None:
    """Return the number under `key`, or None. A record holds NaN and infinity as text."""
    value = (metrics or {}).get(key)
    return None if value is None else float(value)
