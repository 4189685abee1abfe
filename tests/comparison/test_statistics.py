"""Intervals, medians, and what they decide."""

import math

import pytest

from finetune.comparison.statistics import Interval, interval, paired
from finetune.comparison.verdict import judge


def test_an_interval_by_hand():
    found = interval([1.0, 2.0, 3.0])  # deviation 1, t 4.3027
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval([5.0]) == Interval(5.0, None, None)


def test_pairing_removes_what_the_seeds_have_in_common():
    base = [1.0, 5.0, 9.0]
    assert paired([value + 0.5 for value in base], base) == Interval(0.5, 0.5, 0.5)


def around(mean, half=0.1):
    return Interval(mean, mean - half, mean + half)


def test_a_winner_overlaps_with_nobody():
    verdict = judge({"sgd": around(3.0), "adam": around(1.0), "adamw": around(1.5)}, {})
    assert (verdict.winner, verdict.ranking) == ("adam", ["adam", "adamw", "sgd"])
    assert verdict.sentences == [
        "adam wins: test loss 1.000 [0.900, 1.100].",
        "The next is adamw with 1.500 [1.400, 1.600]. No 95% interval overlaps with the winner's.",
    ]


def test_no_clear_winner_where_intervals_overlap():
    verdict = judge(
        {"sgd": around(3.0), "adam": around(1.0), "adamw": around(1.15), "lion": around(1.05)}, {}
    )
    assert verdict.winner is None
    assert verdict.tied == ["adam", "lion", "adamw"]
    assert verdict.sentences == [
        "No clear winner: adam has the lowest test loss, 1.000 [0.900, 1.100], "
        "but the 95% intervals of lion and adamw overlap with it.",
        "Clearly behind adam: sgd.",
    ]


def test_touching_at_an_end_is_overlapping():
    assert Interval(1.0, 0.5, 1.5).overlaps(Interval(2.0, 1.5, 2.5))
    assert not Interval(1.0, 0.5, 1.5).overlaps(Interval(2.0, 1.6, 2.5))


def test_one_seed_never_wins():
    verdict = judge({"adam": Interval(1.0, None, None), "sgd": Interval(9.0, None, None)}, {})
    assert verdict.winner is None
    assert "one seed" in verdict.sentences[0]


def test_who_diverged_is_named_and_not_ranked():
    verdict = judge({"adam": around(1.0), "adamw": around(2.0), "sgd": None}, {"sgd": 2})
    assert (verdict.winner, verdict.ranking) == ("adam", ["adam", "adamw"])
    assert verdict.sentences[-1] == "Not ranked: sgd (2 diverged)."
    alone = judge({"adam": around(1.0), "sgd": None}, {"sgd": 1})
    assert alone.winner == "adam"
    assert "only one that never diverged" in alone.sentences[0]
    nobody = judge({"adam": None, "sgd": None}, {"adam": 3, "sgd": 3})
    assert nobody.winner is None
    assert "every optimizer diverged" in nobody.sentences[0]
