"""Training from a stream: resumed bit for bit, the same for any number of processes."""

import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.data.batches.steps import StepBatch
from finetune.data.batches.stream import StreamingBatches
from finetune.data.encode import RecordEncoder
from finetune.data.formats.text import TextFormat
from finetune.data.sources import stream_records
from finetune.errors import UserError
from tests.data.settings import batch_shape, source
from tests.data.stock import MakeTokenizer

NUM_RECORDS = 90
MAX_LENGTH = 24


@pytest.fixture
def make(tmp_path: Path, make_tokenizer: MakeTokenizer) -> Any:
    """A function that makes the batches as a new process would; each record has its own text."""
    tokenizer = make_tokenizer()
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for f, file in enumerate(files):
        records = [
            {"text": f"{'ab'[f]}{i} " + "x" * (1 + (7 * i) % 15)}
            for i in range(NUM_RECORDS // (1 + f))
        ]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))

    def make(*, shuffle_buffer: int = 20, **options: Any) -> StreamingBatches:
        encoder = RecordEncoder(
            TextFormat(tokenizer=tokenizer, columns={}),
            max_length=MAX_LENGTH,
            overlong="truncate",
            vocab_size=len(tokenizer),
        )
        records = stream_records([source(file) for file in files])
        shape = batch_shape(**{"batch_size": 3, "seed": 5, **options})
        return StreamingBatches(records, encoder, shape, shuffle_buffer=shuffle_buffer)

    return make


def tensors(step: StepBatch) -> list[Any]:
    return [
        step.num_target_tokens,
        step.num_tokens,
        step.epoch,
        *({k: v.tolist() for k, v in b.items()} for b in step.micro_batches),
    ]  # type: ignore[attr-defined]


@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_stream_is_bit_identical_from_any_step(packing: bool, make: Any) -> None:
    expected = [tensors(step) for step in islice(make(packing=packing), 110)]
    assert expected[-1][2] >= 1, "more than one pass"
    batches = make(packing=packing)
    steps = iter(batches)
    for n in range(1, 100):
        next(steps)
        if n % 9 == 0 or n < 4:
            saved = io.BytesIO()
            torch.save(batches.state_dict(), saved)
            saved.seek(0)
            batches = make(packing=packing)  # a resume of a resume of a resume ...
            batches.load_state_dict(torch.load(saved, weights_only=True))
            assert [tensors(step) for step in islice(batches, 4)] == expected[n : n + 4]
            saved.seek(0)
            batches = make(packing=packing)
            batches.load_state_dict(torch.load(saved, weights_only=True))
            steps = iter(batches)


def test_a_state_before_the_first_step_starts_the_stream(make: Any) -> None:
    batches = make()
    batches.load_state_dict(make().state_dict())
    assert [tensors(step) for step in islice(batches, 5)] == [
        tensors(step) for step in islice(make(), 5)
    ]


def examples(step: StepBatch) -> list[tuple[int, ...]]:
    """The token ids of each example in the step's micro-batches, padding left out."""
    found = []
    for batch in step.micro_batches:
        predicted = {place + 1 for place, _ in batch["targets"].tolist()}
        for place, token in enumerate(batch["input_ids"].flatten().tolist()):
            if place in predicted:
                found[-1].append(token)
            elif token != 0:
                found.append([token])
    return [tuple(example) for example in found]


@pytest.mark.parametrize("packing", [True, False])
def test_each_pass_holds_every_example_once_in_another_order(packing: bool, make: Any) -> None:
    batches = make(packing=packing)
    steps = list(islice(batches, 120))
    first, second = (
        [e for step in steps if step.epoch == epoch for e in examples(step)] for epoch in (0, 1)
    )
    assert steps[-1].epoch >= 2
    assert len(first) == NUM_RECORDS * 3 // 2
    assert Counter(first) == Counter(second)
    assert max(Counter(first).values()) == 1
    assert first != second
    assert batches.encoder.statistics.records >= 2 * len(first)


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_the_union_over_processes_is_the_same_step(num_processes: int, make: Any) -> None:
    alone = list(islice(make(), 30))
    shared = [
        list(islice(make(rank=r, num_processes=num_processes), 30)) for r in range(num_processes)
    ]
    for expected, parts in zip(alone, zip(*shared, strict=True), strict=True):
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert sorted(e for part in parts for e in examples(part)) == sorted(examples(expected))
        assert {(part.num_target_tokens, part.num_tokens) for part in parts} == {
            (expected.num_target_tokens, expected.num_tokens)
        }


def test_packed_sequences_are_full(make: Any) -> None:
    steps = list(islice(make(shuffle_buffer=100), 12))
    room = sum(3 * MAX_LENGTH for _ in steps)
    assert sum(step.num_tokens for step in steps) / room > 0.93


def test_the_shuffle_buffer_is_how_far_is_read_ahead(make: Any) -> None:
    read = []
    for shuffle_buffer in (1, 41):
        batches = make(shuffle_buffer=shuffle_buffer)
        next(iter(batches))
        read.append(batches.encoder.statistics.records)
    assert 35 < read[1] - read[0] < 45


def test_a_stream_that_begins_otherwise_is_refused(make: Any, tmp_path: Path) -> None:
    state = make().state_dict()
    (tmp_path / "a.jsonl").write_text('{"text": "something else"}\n')
    with pytest.raises(UserError, match="the training data does not begin as it did"):
        make().load_state_dict(state)


def test_a_stream_without_records_or_targets_is_an_error(make: Any, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": " "}\n')
    with pytest.raises(UserError, match="no target tokens in 2 records"):
        next(iter(make()))


@pytest.mark.parametrize("text", ["", '{"text": " "}\n'])
def test_a_stream_that_is_emptied_ends_the_run(make: Any, tmp_path: Path, text: str) -> None:
    steps = iter(make())
    next(steps)
    for name in ("a.jsonl", "b.jsonl"):  # a log that is rotated
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="over the training data gave no examples, and earlier"):
        list(islice(steps, 100))


def test_a_bad_record_is_named(make: Any, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"words": "fine"}\n')
    with pytest.raises(
        UserError, match=r"b\.jsonl line 1: column 'text' is missing; the columns are words$"
    ):
        next(iter(make()))


@pytest.mark.parametrize("packing", [True, False])
def test_a_bad_record_further_on_costs_no_batch(packing: bool, make: Any, tmp_path: Path) -> None:
    """The state is that before the batch that could not be read."""
    expected = [tensors(step) for step in islice(make(packing=packing), 60)]
    file = tmp_path / "a.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    file.write_text("".join([*lines[:80], '{"words": "fine"}\n', *lines[81:]]))
    batches, found = make(packing=packing), []
    with pytest.raises(UserError, match=r"a\.jsonl line 81: column 'text' is missing"):
        found.extend(map(tensors, batches))  # those before the error stay
    assert 3 < len(found) < 60
    file.write_text(whole)
    resumed = make(packing=packing)
    resumed.load_state_dict(batches.state_dict())
    assert found + [tensors(step) for step in islice(resumed, 60 - len(found))] == expected
