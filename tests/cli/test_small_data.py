"""`train`, `plan` and `inspect` say what small data does to a run, and what is in both halves."""

import json
from pathlib import Path

import pytest

from finetune.run.folder import RunDir
from finetune.run.records import DataCounts, Environment

from .conftest import finetune


@pytest.fixture
def chats(folder: Path) -> Path:
    """Write 200 records with 40 different texts; return the file."""
    records = [{"prompt": f"What is {n % 40}?", "completion": f"{n % 40}."} for n in range(200)]
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def settings(**changes):
    return {
        "data": {"train": "few.jsonl", "validation_fraction": 0.05, **changes},
        "training": {"epochs": 1, "max_steps": None, "batch_size": 8},
        "evaluation": {"samples": 0, "before": False, "generate": 0},
    }


SAID = (
    "which is few: each takes about",
    "the held-out data has 10 examples, so its figures are rough",
    "10 of 10 held-out examples are also in the training data",
    "190 examples have 40 different answers",
)


@pytest.mark.parametrize("command", ["train", "plan", "inspect"])
def test_small_data_is_said(command, chats, write_config):
    write_config(**settings())
    result = finetune(command, "c.yaml")
    assert result.code == 0, result.err
    for sentence in SAID:
        assert sentence in result.err
    if command == "train":
        assert "of about" in result.err
        notes = " ".join(Environment.read(RunDir(Path("run"))).notes)
        assert all(sentence in notes for sentence in SAID)
    if command == "plan":
        assert "examples of a step" in result.out
    if command == "inspect":
        assert "nothing is blank, dropped, left out, cut or split" in result.out
        assert "records without text" not in result.out, "no rows of zeros"


def test_steps_that_were_asked_for_are_not_few(chats, write_config):
    write_config(**settings() | {"training": {"max_steps": 2}})
    result = finetune("train", "c.yaml")
    assert result.code == 0
    assert "which is few" not in result.err


def test_training_without_what_is_held_out(chats, write_config):
    write_config(**settings(drop_duplicates=True))
    result = finetune("train", "c.yaml")
    assert result.code == 0, result.err
    assert "are also in the training data" not in result.err
    counts = DataCounts.read(RunDir(Path("run"))).train
    assert counts["duplicates"] > 0
    assert counts["examples"] + counts["duplicates"] == 190
    write_config(**settings(drop_duplicates=True, validation="few.jsonl"))
    result = finetune("train", "c.yaml", "overwrite_output_dir=true")
    assert result.code == 2
    assert "all 200 training examples are also held out" in result.err
    write_config(**settings(drop_duplicates=True, streaming=True, validation_fraction=0.0))
    assert "duplicates in a stream cannot be found" in finetune("inspect", "c.yaml").err
