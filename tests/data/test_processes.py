"""Rows encoded by several processes, as one would."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.data.encode import EncodedDataset, encode
from finetune.data.processes import PART, map_in_processes
from finetune.data.text import TextFormat
from finetune.errors import UserError

from .stock import MakeTokenizer


def run(texts: list[Any], make_tokenizer: MakeTokenizer, num_proc: int) -> EncodedDataset:
    tokenizer = make_tokenizer()
    rows = [(f"data.jsonl, row {number}", {"text": text}) for number, text in enumerate(texts, start=1)]
    format = TextFormat(tokenizer=tokenizer, columns={})
    return encode(rows, format, max_length=12, overlong="truncate", vocab_size=len(tokenizer), num_proc=num_proc)


def test_examples_counts_and_row_numbers_are_those_of_one_process(make_tokenizer: MakeTokenizer) -> None:
    texts = ["" if number % 7 == 0 else "a b " * (number % 5) + str(number) for number in range(2 * PART + 1)]
    alone, together = (run(texts, make_tokenizer, num_proc) for num_proc in (1, 2))
    assert together.fingerprint == alone.fingerprint
    assert together.statistics == alone.statistics
    counts = alone.statistics
    assert counts.rows == len(texts)
    assert counts.truncated > 0 < counts.blank_rows
    assert [together.row_of(i) for i in range(len(together))] == [alone.row_of(i) for i in range(len(alone))]
    assert list(together.target_counts) == list(alone.target_counts)


def test_a_bad_row_is_named(make_tokenizer: MakeTokenizer) -> None:
    texts = ["a"] * (PART + 6) + [7] + ["b"] * PART
    with pytest.raises(UserError) as alone:
        run(texts, make_tokenizer, 1)
    with pytest.raises(UserError) as together:
        run(texts, make_tokenizer, 2)
    assert str(together.value) == str(alone.value)
    assert str(alone.value).startswith(f"data.jsonl, row {PART + 7}: ")


def test_rows_are_read_only_a_little_ahead() -> None:
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield read

    results = map_in_processes(sum, endless(), 1)
    assert next(results) == sum(range(1, PART + 1))
    assert read <= 4 * PART
    results.close()


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from finetune.data.processes import map_in_processes\nprint(list(map_in_processes(sum, range(9), 2)))\n")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert ran.returncode != 0
    assert 'outside of `if __name__ == "__main__":`; set data.num_proc: 1' in ran.stderr.splitlines()[-1]
