"""Small or odd data is not starved in silence: each case has its sentence; good data has none."""

from collections.abc import Sequence
from typing import Any

import pytest

from finetune.data.advice import advice
from finetune.data.encode import EncodedDataset
from finetune.data.statistics import also_in, without
from finetune.data.types import IGNORE_INDEX, Example


def dataset(answers: Sequence[int], *, start: int = 0, **counts: int) -> EncodedDataset:
    """Return an example for each answer: a question of its own and the answer, a token each."""
    made = EncodedDataset()
    for number, answer in enumerate(answers, start=start):
        made.append(Example([number, answer], [IGNORE_INDEX, answer]))
    made.statistics.examples = len(made)
    for name, count in counts.items():
        setattr(made.statistics, name, count)
    return made


GOOD: dict[str, Any] = {
    "train": dataset(range(100)),
    "held_out": dataset(range(20), start=1000),
    "num_steps": 100,
    "per_step": 6.0,
    "max_length": 64,
}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "few steps": (
        {"num_steps": 6, "per_step": 50.2},
        "the run has 6 steps, which is few: each takes about 50 of the 100 examples. Set "
        "training.batch_size=auto, or raise training.epochs",
    ),
    "one step": ({"num_steps": 1, "per_step": 100.0}, "the run has 1 step, which is few"),
    "few examples": (
        {"num_steps": 60, "per_step": 1.0},
        "the run has 60 steps, which is few: each takes about 1 of the 100 examples. Raise "
        "training.epochs",
    ),
    "few held-out examples": (
        {"held_out": dataset(range(19), start=1000)},
        "the held-out data has 19 examples, so its figures are rough. More data, or data.val",
    ),
    "held out and trained on": (
        {"held_out": dataset(range(30))},
        "30 of 30 held-out examples are also in the training data, so the held-out loss shows",
    ),
    "cut": (
        {"train": dataset(range(100), truncated=60, without_target=10)},
        "60 of 110 examples are cut to data.max_length = 64, and a cut answer does not teach wh",
    ),
    "left out": (
        {"train": dataset(range(100), dropped=12)},
        "12 of 112 examples are over data.max_length = 64 and left out. Raise data.max_length, or",
    ),
    "repeated answers": (
        {"train": dataset([7, 8] * 50)},
        "100 examples have 2 different answers, so most of what is learnt repeats",
    ),
}


def test_good_data_needs_no_advice() -> None:
    assert advice(**GOOD) == []
    assert advice(**GOOD | {"held_out": None, "num_steps": None, "per_step": None}) == []


@pytest.mark.parametrize("case", CASES)
def test_each_case_has_its_sentence_with_what_to_change(case: str) -> None:
    changed, expected = CASES[case]
    [sentence] = advice(**GOOD | changed)
    assert sentence.startswith(expected)
    assert ". " in sentence
    assert len(CASES) == 8


EDGES: dict[str, tuple[dict[str, Any], int]] = {
    # the change -> how many sentences
    "99 steps": ({"num_steps": 99}, 1),
    "100 steps": ({"num_steps": 100}, 0),
    "19 held out": ({"held_out": dataset(range(19), start=1000)}, 1),
    "20 held out": ({"held_out": dataset(range(20), start=1000)}, 0),
    "nothing held out": ({"held_out": None}, 0),
    "one of 20 held out trained on": (
        {"held_out": dataset([0, *range(1, 20)], start=0)},
        1,
    ),
    "same answers to other questions held out": ({"held_out": dataset(range(30), start=500)}, 0),
    "half cut": ({"train": dataset(range(100), truncated=50)}, 0),
    "more than half cut": ({"train": dataset(range(100), truncated=51)}, 1),
    "cut without a target left": (
        {"train": dataset(range(100), truncated=110, without_target=110)},
        1,
    ),
    "a tenth left out": ({"train": dataset(range(90), dropped=10)}, 0),
    "more than a tenth left out": ({"train": dataset(range(90), dropped=11)}, 1),
    "most left out and most cut": ({"train": dataset(range(10), dropped=90, truncated=9)}, 2),
    "half of the answers differ": ({"train": dataset([*range(50), *range(50)])}, 0),
    "fewer than half differ": ({"train": dataset([*range(49), *range(49), 0, 0])}, 1),
    "one answer": ({"train": dataset([7] * 100)}, 1),
    "one example": ({"train": dataset([7])}, 0),
    "a few examples": ({"train": dataset(range(3)), "num_steps": 3, "per_step": 1.0}, 1),
    "everything at once": (
        {
            "train": dataset([7] * 100, truncated=80, dropped=50),
            "held_out": dataset([7] * 3),
            "num_steps": 2,
        },
        6,
    ),
}


@pytest.mark.parametrize("case", EDGES)
def test_where_each_sentence_begins(case: str) -> None:
    changed, count = EDGES[case]
    found = advice(**GOOD | changed)
    assert len(found) == count
    assert len(EDGES) == 19


def test_duplicates_of_held_out_examples_are_left_out() -> None:
    train, held_out = dataset([1, 2, 3, 4, 5]), dataset([9, 4, 5], start=2)
    assert also_in(train, held_out) == 2
    kept = without(train, held_out)
    assert [list(example.input_ids) for example in kept] == [[0, 1], [1, 2], [2, 3]]
    counts = kept.statistics
    assert (counts.examples, counts.tokens, counts.target_tokens, counts.duplicates) == (3, 6, 3, 2)
