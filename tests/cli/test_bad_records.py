"""Bad records do not end a run one at a time: all are listed, or dropped, counted and reported."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune.run.folder import RunDir
from finetune.run.records import DataCounts, Environment

from .conftest import finetune


def turns(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


BAD = {
    3: turns(("user", "a"), ("assistant", " ")),
    7: turns(("user", "a"), ("robot", "b")),
    8: {"messages": []},
    11: turns(("user", "a"), ("user", "b"), ("assistant", "c")),
    15: turns(("assistant", "a"), ("user", "b")),
    16: {"messages": None},
    20: {"other": "columns"},
    21: '{"messages": [',
}


@pytest.fixture
def bad_lines(folder: Path) -> Path:
    """Write 30 records, of which those of BAD cannot be used; return the file."""
    good = [turns(("user", f"What is {n} plus {n}?"), ("assistant", f"It is {2 * n}."))
            for n in range(30)]  # fmt: skip
    lines = [BAD.get(number, record) for number, record in enumerate(good, start=1)]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path = folder / "bad.jsonl"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def settings(**data: Any) -> dict[str, Any]:
    return {
        "data": {"train": "bad.jsonl", "validation_fraction": 0.2, **data},
        "training": {"max_steps": 2},
        "evaluation": {"samples": 0, "before": False, "generate": 0},
    }


@pytest.mark.parametrize("command", ["train", "inspect", "plan"])
def test_all_bad_records_are_listed_at_once(command, bad_lines, write_config):
    write_config(**settings())
    first = finetune(command, "c.yaml")
    assert first.code == 2
    assert "bad.jsonl line 21 is broken JSON" in first.err, "what is no record comes first"
    lines = bad_lines.read_text().splitlines()
    bad_lines.write_text("\n".join(lines[:20] + lines[21:]) + "\n")
    result = finetune(command, "c.yaml")
    assert result.code == 2
    last = result.err.splitlines()[-1]
    assert "7 records cannot be used: " in last, "those of the held-out data too"
    for number in set(BAD) - {21}:
        assert re.search(rf"lines? ([0-9]+, )*{number}\b", last)
    for reason in ("message 2 (assistant) is empty", "'robot'", "is missing"):
        assert reason in last
    assert last.endswith("Mend them, or set data.on_bad_record=drop to go on without them")


def test_bad_records_are_dropped_counted_and_reported(bad_lines, write_config):
    write_config(**settings(on_bad_record="drop"))
    inspected = finetune("inspect", "c.yaml")
    assert inspected.code == 0, inspected.err
    assert "bad records dropped" in inspected.out
    assert "records without text" in inspected.out
    assert "nothing is blank" not in inspected.out
    trained = finetune("train", "c.yaml")
    assert trained.code == 0, trained.err
    counts = DataCounts.read(RunDir(Path("run")))
    assert counts.train["bad_records"] + counts.validation["bad_records"] == len(BAD)
    assert counts.train["records"] + counts.validation["records"] == 30 - len(BAD)
    notes = " ".join(Environment.read(RunDir(Path("run"))).notes)
    for number in BAD:
        assert re.search(rf"lines? ([0-9]+, )*{number}\b", notes)
    assert "(data.on_bad_record)" in notes


def test_bad_records_of_a_stream(bad_lines, write_config):
    write_config(**settings(streaming=True, validation_fraction=0.0))
    result = finetune("train", "c.yaml")
    assert result.code == 2
    assert "bad.jsonl line 21 is broken JSON" in result.err
    write_config(**settings(streaming=True, validation_fraction=0.0, on_bad_record="drop"))
    result = finetune("train", "c.yaml")
    assert result.code == 0, result.err
    counts = DataCounts.read(RunDir(Path("run"))).train
    assert counts["bad_records"] > 0
    assert counts["bad_records"] * 22 == counts["records"] * len(BAD), "in whole passes"


def test_data_of_bad_records_alone(bad_lines, write_config):
    bad_lines.write_text(json.dumps(BAD[3]) + "\n" + json.dumps(BAD[8]) + "\n")
    write_config(**settings(on_bad_record="drop", validation_fraction=0.0))
    result = finetune("train", "c.yaml")
    assert result.code == 2
    assert "the data holds no records: all 2 were dropped (2 records cannot be used: " in result.err
    write_config(**settings(on_bad_record="drop", streaming=True, validation_fraction=0.0))
    streamed = finetune("inspect", "c.yaml")
    assert streamed.code == 2
    assert "the start of the stream, at most 1,000 records: the data holds no" in streamed.err


def test_a_stream_of_bad_lines_alone_says_what_is_wrong_with_them(bad_lines, write_config):
    bad_lines.write_text("oops\n[1]\n")
    write_config(**settings(on_bad_record="drop", streaming=True, validation_fraction=0.0))
    result = finetune("inspect", "c.yaml")
    assert result.code == 2
    assert "bad.jsonl has no row that can be used: 2 records cannot be used: " in result.err


def test_held_out_data_without_a_target_is_named(folder, write_config):
    """If it is drawn at random, and if it is given."""
    texts = ["The word is good.", "Another one.", *[" "] * 8]
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    write_config(**settings(train="t.jsonl", validation_fraction=0.1))
    said = [finetune("inspect", "c.yaml", f"seed={seed}").err for seed in range(4)]
    drawn = [err for err in said if "the held-out data: no target tokens in 1 record, " in err]
    assert drawn
    assert all("1 blank. Give data.validation, or another seed" in err for err in drawn)
    (folder / "v.jsonl").write_text('{"text": " "}\n')
    write_config(**settings(train="t.jsonl", validation="v.jsonl"))
    given = finetune("inspect", "c.yaml").err
    assert "the held-out data: no target tokens in 1 record, " in given
    assert "another seed" not in given


def test_a_bad_record_of_a_file_whose_name_is_not_utf8_is_in_the_log(bad_lines, write_config):
    bad_lines.rename("caf\udce9.jsonl")
    write_config(**settings(train="caf*.jsonl", on_bad_record="drop"))
    result = finetune("train", "c.yaml")
    assert result.code == 0, result.err
    assert "caf\\udce9.jsonl" in RunDir(Path("run")).log.read_text(encoding="utf-8")
