"""Durations, sizes, counts and lists in words, on the terminal and on a page."""

from collections.abc import Sequence


def clock(seconds: float) -> str:
    """Return a duration in words: "0.4 s", "43 s", "1 min 10 s", "2 h 05 min"."""
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(num_bytes: float) -> str:
    """Return a number of bytes in three figures: "512 B", "1.50 KiB", "15.6 GiB"."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            break
        num_bytes, unit = num_bytes / 1024, larger
    decimals = 0 if unit == "B" or num_bytes >= 99.95 else 1 if num_bytes >= 9.995 else 2
    return f"{num_bytes:,.{decimals}f} {unit}"


def listed(names: Sequence[str]) -> str:
    """Return the names as a phrase: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def counted(number: float, thing: str) -> str:
    """Return a whole number of things: "1 example", "2,000 examples"."""
    return f"{number:,.0f} {thing}{'s' * (round(number) != 1)}"
