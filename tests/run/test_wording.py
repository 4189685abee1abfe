"""Durations, sizes and lists in words, also at the points at which rounding changes the unit."""

import pytest

from finetune.run.wording import clock, listed, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (42.6, "43 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (70, "1 min 10 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1,023 B"),
        (1536, "1.50 KiB"),
        (9.997 * 1024, "10.0 KiB"),
        (99.97 * 1024, "100 KiB"),
        (8_000_000, "7.63 MiB"),
        (1000 * 2**20, "1,000 MiB"),
        (15.62 * 2**30, "15.6 GiB"),
        (2**41, "2,048 GiB"),
    ],
)
def test_size(num_bytes, text):
    assert size(num_bytes) == text


def test_listed():
    assert [listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
