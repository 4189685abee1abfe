"""Rows from real files of every kind, mixed, held out, streamed; and what is said of files that cannot be read."""

import gc
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.sources import Rows, Source, load_rows, split_held_out, stream_rows
from finetune.data.sources.records import _interleave
from finetune.errors import UserError

PAIRS = [{"en": f"Sentence {i}", "fr": f"Phrase {i}"} for i in range(7)]
ODD = [
    {"en": "None", "fr": 'Il a dit "oui'},
    {"en": "1989", "fr": "NA"},
    {"en": "2020-01-01", "fr": "é\u2028ü"},
]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(*sources: Source) -> list[dict[str, Any]]:
    """The rows held in memory, after checking that a stream gives the same."""
    rows = load_rows(sources)
    if len(sources) == 1:
        assert list(stream_rows(sources)) == list(rows)
    return [dict(rows[i]) for i in range(len(rows))]


KINDS = ["data.jsonl", "data.json", "data.csv", "data.tsv", "data.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_local_files_of_every_kind(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, PAIRS)
    assert read(Source(str(path))) == PAIRS
    assert read(Source(str(path), max_rows=3)) == PAIRS[:3]
    assert load_rows([Source(str(path))]).describe(4) == f"{path}, row 5"


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.tsv"])
def test_text_stays_as_it_is(name: str, tmp_path: Path) -> None:
    """Not "None" to nothing, nor "1989" to a number, nor a quotation mark in a TSV to the start of a field."""
    rows = ODD if name != "data.jsonl" else ODD[:2]
    assert read(Source(str(write(tmp_path, name, rows)))) == rows


def test_text_files_folders_globs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\nthree\x0bstill\r\n", encoding="utf-8")
    assert read(Source(str(tmp_path / "a.txt"))) == [
        {"text": "one"},
        {"text": ""},
        {"text": "three\x0bstill"},
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, "train.jsonl", PAIRS[:4])
    write(folder, "test.jsonl", PAIRS[4:])
    assert read(Source(str(folder))) == PAIRS[:4]
    assert read(Source(str(folder), split="test")) == PAIRS[4:]
    assert read(Source(str(folder / "t*.jsonl"))) == PAIRS[4:] + PAIRS[:4]


def test_aligned_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("un\ndeux", encoding="utf-8")
    source = Source(str(tmp_path / "a.txt"), target_path=str(tmp_path / "b.txt"))
    assert read(source) == [{"source": "one", "target": "un"}, {"source": "two", "target": "deux"}]
    (tmp_path / "b.txt").write_text("un\n", encoding="utf-8")
    for open_ in (load_rows, stream_rows):
        with pytest.raises(
            UserError, match=r"has 2 lines and .* has 1; aligned files must have as many lines"
        ):
            open_([source])


def test_aligned_text_files_are_named_by_their_languages(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "a.fr").write_text("un\ndeux", encoding="utf-8")
    assert read(Source(str(tmp_path / "a.en"), target_path=str(tmp_path / "a.fr"))) == [
        {"en": "one", "fr": "un"},
        {"en": "two", "fr": "deux"},
    ]
    (tmp_path / "b.csv").write_text("un\ndeux", encoding="utf-8")
    with pytest.raises(UserError, match="must be two text files"):
        load_rows([Source(str(tmp_path / "a.en"), target_path=str(tmp_path / "b.csv"))])


def test_a_stream_can_be_read_in_another_thread() -> None:
    """As a new tokenizer reads it."""
    rows = iter(stream_rows([Source("package:translation.en-fr.test")]))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: sum(1 for _ in rows)).result() == 100


def test_the_demo_data_of_the_package() -> None:
    rows = load_rows([Source("package:translation.en-fr.test")])
    assert len(rows) == 100
    assert set(rows[0]) == {"translation", "source"}
    with pytest.raises(
        UserError,
        match=r"has no data 'chat\.en\.tset'; it has chat\.en\.test, .*did you mean 'chat\.en\.test'",
    ):
        load_rows([Source("package:chat.en.tset")])


def mixed(tmp_path: Path, weights: tuple[float | None, float | None]) -> list[Source]:
    many = write(tmp_path, "many.jsonl", [{"text": f"a{i}"} for i in range(60)])
    few = write(tmp_path, "few.jsonl", [{"text": f"b{i}"} for i in range(20)])
    return [Source(str(many), weight=weights[0]), Source(str(few), weight=weights[1])]


def test_without_weights_each_row_comes_once_and_evenly_spread(tmp_path: Path) -> None:
    rows = [row["text"] for _, row in load_rows(mixed(tmp_path, (None, None)))]
    assert Counter(rows) == Counter([f"a{i}" for i in range(60)] + [f"b{i}" for i in range(20)])
    assert all(sum(text.startswith("b") for text in rows[i : i + 4]) == 1 for i in range(0, 80, 4))
    streamed = [row["text"] for _, row in stream_rows(mixed(tmp_path, (None, None)))]
    assert sorted(streamed) == sorted(rows)
    assert streamed[:6] == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_with_weights_the_shares_are_exact_until_a_source_runs_out(tmp_path: Path) -> None:
    sources = mixed(tmp_path, (1.0, 3.0))
    for rows in (load_rows(sources), stream_rows(sources)):
        texts = [row["text"] for _, row in rows]
        assert [text for text in texts if text[0] == "b"] == [f"b{i}" for i in range(20)]
        assert len(texts) in (26, 27)
        assert texts == [row["text"] for _, row in load_rows(sources)], (
            "in memory and streamed alike"
        )
    with pytest.raises(UserError, match="give every source a weight, or none"):
        load_rows(mixed(tmp_path, (1.0, None)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_interleaving_loses_nothing_and_keeps_the_shares_at_all_times(sizes: list[int]) -> None:
    order = list(_interleave(sizes, None))
    assert sorted(order) == [(k, i) for k, size in enumerate(sizes) for i in range(size)]
    for k, size in enumerate(sizes):
        for n in range(1, len(order) + 1):
            taken = sum(source == k for source, _ in order[:n])
            assert abs(taken - n * size / sum(sizes)) <= len(sizes)


def test_rows_are_held_out_at_random_and_for_good(tmp_path: Path) -> None:
    rows = load_rows(
        [Source(str(write(tmp_path, "data.jsonl", [{"text": str(i)} for i in range(100)])))]
    )

    def texts(part: Rows) -> list[str]:
        return [row["text"] for _, row in part]

    train, held_out = split_held_out(rows, fraction=0.1, seed=0)
    assert (len(train), len(held_out)) == (90, 10)
    assert sorted(texts(train) + texts(held_out)) == sorted(texts(rows))
    assert texts(split_held_out(rows, fraction=0.1, seed=0)[1]) == texts(held_out)
    assert texts(split_held_out(rows, fraction=0.1, seed=1)[1]) != texts(held_out)
    assert held_out.describe(0).endswith(f"row {int(held_out[0]['text']) + 1}"), (
        "a row keeps its number"
    )
    assert len(split_held_out(rows.take(2), fraction=0.001, seed=0)[1]) == 1
    assert len(split_held_out(rows.take(2), fraction=1.0, seed=0)[0]) == 1
    with pytest.raises(UserError, match="none can be held out"):
        split_held_out(rows.take(1), fraction=0.1, seed=0)


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning"
)  # `datasets` leaves a CSV open that is not read to its end
@pytest.mark.parametrize("name", [*KINDS, "data.txt", "mix"])
def test_a_stream_goes_on_from_any_row(name: str, tmp_path: Path) -> None:
    """Also after having gone on once before."""
    if name == "mix":
        sources = mixed(tmp_path, (None, None))
    elif name == "data.txt":
        (tmp_path / name).write_text("".join(f"line {i}\n" for i in range(7)), encoding="utf-8")
        sources = [Source(str(tmp_path / name))]
    else:
        sources = [Source(str(write(tmp_path, name, PAIRS)))]
    expected = list(stream_rows(sources))
    for stride in (2, 7) if name == "mix" else (1, 3):
        got: list[Any] = []
        state: dict[str, Any] | None = None
        while len(got) < len(expected):
            stream = stream_rows(sources)
            if state is not None:
                stream.load_state_dict(state)
            got += islice(stream, stride)
            state = json.loads(json.dumps(stream.state_dict()))
        assert got == expected
    assert list(stream) == expected, "the pass after that is a whole one again"
    del stream
    gc.collect()


BROKEN = {
    "broken.jsonl": ('{"a": 1}\n{"a": \n{"a": 3}\n', "broken.jsonl line 2 is broken JSON"),
    "cut.jsonl": ('{"a": 1}\n\n{"a": "2', "cut.jsonl line 3 is broken JSON"),
    "list.jsonl": ('{"a": 1}\n[1, 2]\n', "list.jsonl line 2 must be a JSON object"),
    "broken.json": ('[\n {"a": 1},\n {"a" 2}\n]', "broken.json line 3 is broken JSON"),
    "object.json": ('{\n "a": {"b": 1}, "c": [\n', "object.json line 2 is broken JSON"),
    "empty.jsonl": ("", "empty.jsonl is empty"),
    "blank.jsonl": ("\n\n", "blank.jsonl is empty: there are no rows in it"),
    "header.csv": ("en,fr\n", "header.csv is empty: there are no rows in it"),
    "ragged.csv": ("en,fr\na,b\nc,d,e\n", "ragged.csv cannot be read"),
    "data.xml": (
        "<a/>",
        "data.xml has the unknown ending '.xml'; known are .json, .jsonl, .csv, .tsv, .parquet, .txt",
    ),
    "data.parquet": ("no parquet at all", "data.parquet cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name: str, tmp_path: Path) -> None:
    text, expected = BROKEN[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_rows([Source(str(tmp_path / name))])
    assert expected in str(caught.value)
    if "is empty: there are no rows" in expected:
        assert list(stream_rows([Source(str(tmp_path / name))])) == []
    else:
        with pytest.raises(UserError) as caught:
            list(stream_rows([Source(str(tmp_path / name))]))
        assert expected in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_different_columns_are_to_be_several_sources(
    streaming: bool, tmp_path: Path
) -> None:
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    completion = [{"prompt": "a", "completion": "b"}]
    write(tmp_path, "a.jsonl", chat)
    write(tmp_path, "b.jsonl", completion)
    read = (lambda sources: list(stream_rows(sources))) if streaming else load_rows
    with pytest.raises(UserError) as caught:
        read([Source(str(tmp_path))])
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}: its rows do not have the same columns (messages; further on "
    )
    assert message.endswith(
        "put each kind into files of its own, and list these as several sources"
    )
    assert (
        len(list(stream_rows([Source(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")])))
        == 2
    )


MISSING = {
    "nowhere.jsonl": "there is no file or folder 'nowhere.jsonl' (looked in ",
    "./nowhere": "there is no file or folder './nowhere'",
    "nowhere/*.jsonl": "no file matches 'nowhere/*.jsonl' (looked in ",
    "nobody/nothing": "dataset 'nobody/nothing' not found: it is no file or folder here (looked in ",
    "no/such/name/at all": "not found: it is no file or folder here",
}


@pytest.mark.parametrize("path", MISSING)
def test_what_is_not_found_says_where_it_was_looked_for_and_fast(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"
    )  # nobody answers there
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_rows([Source(path)])
    assert MISSING[path] in str(caught.value)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_a_missing_split_lists_those_there_are(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, PAIRS)
    with pytest.raises(
        UserError,
        match=r"data\.\w+ \(validation\): unknown split .validation.; it should be one of \['train'\]",
    ):
        load_rows([Source(str(tmp_path / name), split="validation")])


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", PAIRS)
    write(tmp_path, "b.csv", PAIRS)
    with pytest.raises(UserError, match=r"files of several kinds in one source \(csv, json\)"):
        load_rows([Source(str(tmp_path / "*"))])


def test_there_was_something_to_check() -> None:
    assert (len(KINDS), len(BROKEN), len(MISSING)) == (5, 11, 5)
