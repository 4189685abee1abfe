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
    "num_steps": 50,
    "per_step": 6.0,
    "max_length": 64,
}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "few steps": (
        {"num_steps": 6, "per_step": 50.2},
        "the run has 6 steps, which is few: each takes about 50 of the 100 examples. Lower "
        "training.batch_size, or raise training.epochs",
    ),
    "one step": ({"num_steps": 1, "per_step": 100.0}, "the run has 1 step, which is few"),
    "few held-out examples": (
        {"held_out": dataset(range(19), start=1000)},
        "the held-out data has 19 examples, so its figures are rough. Raise data.validation_f",
    ),
    "held out and trained on": (
        {"held_out": dataset(range(30))},
        "30 of 30 held-out examples are also in the training data, so the held-out loss shows",
    ),
    "cut": (
        {"train": dataset(range(100), truncated=60, without_target=10)},
        "60 of 110 examples are cut to data.max_length = 64, and a cut answer does not teach wh",
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
    assert len(CASES) == 6


def test_duplicates_of_held_out_examples_are_left_out() -> None:
    train, held_out = dataset([1, 2, 3, 4, 5]), dataset([9, 4, 5], start=2)
    assert also_in(train, held_out) == 2
    kept = without(train, held_out)
    assert [list(example.input_ids) for example in kept] == [[0, 1], [1, 2], [2, 3]]
    counts = kept.statistics
    assert (counts.examples, counts.tokens, counts.target_tokens, counts.duplicates) == (3, 6, 3, 2)
