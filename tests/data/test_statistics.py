"""What `finetune inspect` shows, on data small enough to count by hand, and on the demo data."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches.dataset import EvaluationBatches, TrainingBatches
from finetune.data.encode import EncodedDataset, encode
from finetune.data.formats.detect import build_format
from finetune.data.sources import load_records
from finetune.data.statistics import characters_per_token, histogram, pieces, report_on
from finetune.data.types import IGNORE_INDEX, Example
from tests.data.settings import batch_shape, format_options, source
from tests.data.stock import DEFAULT_SYSTEM, MakeTokenizer
from tests.vocabularies import real_tokenizer


def test_examples_read_as_text_with_their_targets(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("Hello there, é", add_special_tokens=False)["input_ids"]
    parts = pieces(
        Example(ids, [IGNORE_INDEX, *ids[1:3], *[IGNORE_INDEX] * (len(ids) - 3)]), tokenizer
    )
    assert [is_target for _, is_target in parts] == [False, True, False]
    assert "".join(text for text, _ in parts) == "Hello there, é"


@given(st.lists(st.integers(1, 300), min_size=1), st.integers(1, 12))
def test_a_histogram_counts_every_length_once(lengths: list[int], bins: int) -> None:
    found = histogram(lengths, bins=bins)
    assert len(found) <= bins
    assert [count for _, _, count in found] == [
        sum(low <= length <= high for length in lengths) for low, high, _ in found
    ]
    assert sum(count for _, _, count in found) == len(lengths)
    assert all(b[0] == a[1] + 1 for a, b in pairwise(found))


def dataset(*examples: list[int]) -> EncodedDataset:
    data = EncodedDataset()
    for ids in examples:
        data.append(Example(ids, [IGNORE_INDEX, *ids[1:]]))
    return data


def test_duplicates_and_vocabulary_by_hand(make_tokenizer: MakeTokenizer) -> None:
    train = dataset([10, 11, 12], [10, 11, 12], [10, 11], [20, 21, 22, 23])
    held_out = dataset([10, 11], [10, 99], [10, 11, 12])
    report = report_on(train, held_out, tokenizer=make_tokenizer(), vocab_size=600)
    assert (report.duplicates, report.leaked) == (1, 2)
    assert (report.vocabulary_rows, report.vocabulary_rows_used) == (600, 7)
    assert report.held_out_coverage == pytest.approx(6 / 7)
    assert report.target_share == pytest.approx(8 / 12)
    assert (report.length_p50, report.length_p95, report.length_max) == (3, 4, 4)
    alone = report_on(train, None, tokenizer=make_tokenizer(), vocab_size=600)
    assert (alone.leaked, alone.held_out, alone.held_out_coverage) == (None, None, None)
    json.dumps(alone.as_dict())


DEMO = {
    "translation.en-fr": ("translation", 1800),
    "translation.en-de": ("translation", 1800),
    "chat.en": ("chat", 677),
}


@pytest.mark.parametrize("name", DEMO)
def test_the_demo_data_goes_all_the_way_to_batches(
    name: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(DEFAULT_SYSTEM)
    splits = [load_records([source(f"package:{name}.{split}")]) for split in ("train", "test")]
    format = build_format("auto", format_options(), tokenizer=tokenizer, first_record=splits[0][0])
    assert format.name == DEMO[name][0]
    train, test = (
        encode(records, format, max_length=512, overlong="truncate", vocab_size=len(tokenizer))
        for records in splits
    )
    assert train.statistics.records == DEMO[name][1]
    assert train.statistics.examples >= train.statistics.records
    shape = batch_shape(batch_size=8, micro_batch_size=4)
    batches = TrainingBatches(train, shape, max_length=512)
    steps = list(batches.epoch(0))
    assert sum(step.num_target_tokens for step in steps) == train.statistics.target_tokens
    assert sum(step.num_tokens for step in steps) == train.statistics.tokens
    evaluation = EvaluationBatches(test, max_length=512, packing=True, batch_size=8, pad_id=0)
    targets = sum(len(batch["targets"]) for batch in evaluation)
    assert targets == test.statistics.target_tokens > 0
    report = report_on(train, test, tokenizer=tokenizer, vocab_size=len(tokenizer))
    assert 0.1 < report.target_share < 0.9
    assert report.leaked == 0
    prompts = [prompt for _, record in splits[1] for prompt in format.prompts(record)]
    assert len(prompts) == len(splits[1])
    assert all(prompt.reference and prompt.text and prompt.input_ids for prompt in prompts)


def test_characters_per_token_show_which_language_falls_into_bytes():
    """Korean is no part of SmolLM2's tokenizer: a character takes two or three tokens."""
    tokenizer = real_tokenizer("smollm2")
    english, french, korean = (
        characters_per_token([text] * 2, tokenizer)
        for text in (
            "The file could not be saved. Please try again.",
            "Le fichier n'a pas pu être enregistré. Veuillez réessayer.",
            "파일을 저장할 수 없습니다. 다시 시도하십시오.",
        )
    )
    assert english > 4 > french > 2 > 1 > korean > 0.3
    assert characters_per_token([], tokenizer) == 0
