"""Records from files of every kind, mixed, held out, streamed; and files that cannot be read."""

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

from finetune.data.sources import Records, Source, load_records, split_held_out, stream_records
from finetune.data.sources.records import _interleave
from finetune.errors import UserError
from tests.data.settings import source

PAIRS = [{"en": f"Sentence {i}", "fr": f"Phrase {i}"} for i in range(7)]
ODD = [
    {"en": "None", "fr": 'Il a dit "oui'},
    {"en": "1989", "fr": "NA"},
    {"en": "2020-01-01", "fr": "é\u2028ü"},
]


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(records).to_csv(path)
    elif path.suffix == ".tsv":
        lines = ["\t".join(records[0]), *("\t".join(record.values()) for record in records)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(*sources: Source) -> list[dict[str, Any]]:
    """The records held in memory, after checking that a stream gives the same."""
    records = load_records(sources)
    if len(sources) == 1:
        assert list(stream_records(sources)) == list(records)
    return [dict(records[i]) for i in range(len(records))]


KINDS = ["data.jsonl", "data.json", "data.csv", "data.tsv", "data.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_local_files_of_every_kind(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, PAIRS)
    assert read(source(path)) == PAIRS
    assert read(source(path, max_records=3)) == PAIRS[:3]
    where = {".jsonl": " line 5", ".json": " line 18", ".parquet": ", row 5"}
    place = where.get(path.suffix, " line 6")
    assert load_records([source(path)]).describe(4) == f"{path}{place}"


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.tsv"])
def test_text_stays_as_it_is(name: str, tmp_path: Path) -> None:
    """Not "None" to nothing, nor "1989" to a number, nor a mark in a TSV to a quotation."""
    records = ODD if name != "data.jsonl" else ODD[:2]
    assert read(source(write(tmp_path, name, records))) == records


def test_text_files_folders_globs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\nthree\x0bstill\r\n", encoding="utf-8")
    assert read(source(tmp_path / "a.txt")) == [
        {"text": "one"},
        {"text": "three\x0bstill"},
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, "train.jsonl", PAIRS[:4])
    write(folder, "test.jsonl", PAIRS[4:])
    assert read(source(folder)) == PAIRS[:4]
    assert read(source(folder, split="test")) == PAIRS[4:]
    assert read(source(folder / "t*.jsonl")) == PAIRS[4:] + PAIRS[:4]


def test_aligned_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("un\ndeux", encoding="utf-8")
    pairs = source(tmp_path / "a.txt", target_path=str(tmp_path / "b.txt"))
    assert read(pairs) == [{"source": "one", "target": "un"}, {"source": "two", "target": "deux"}]
    (tmp_path / "b.txt").write_text("un\n", encoding="utf-8")
    for open_ in (load_records, stream_records):
        with pytest.raises(
            UserError, match=r"has 2 lines and .* has 1; aligned files must have equally many lines"
        ):
            open_([pairs])


def test_aligned_text_files_are_named_by_their_languages(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "a.fr").write_text("un\ndeux", encoding="utf-8")
    assert read(source(tmp_path / "a.en", target_path=str(tmp_path / "a.fr"))) == [
        {"en": "one", "fr": "un"},
        {"en": "two", "fr": "deux"},
    ]
    (tmp_path / "b.csv").write_text("un\ndeux", encoding="utf-8")
    with pytest.raises(UserError, match=r"there is no file or folder '.*/a\.ft'"):
        load_records([source(tmp_path / "a.en", target_path=str(tmp_path / "a.ft"))])
    with pytest.raises(UserError, match="must be two text files"):
        load_records([source(tmp_path / "a.en", target_path=str(tmp_path / "b.csv"))])


def test_blank_lines_keep_their_place_in_aligned_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n \nthree\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("un\ndeux\n\n", encoding="utf-8")
    assert read(source(tmp_path / "a.txt")) == [{"text": "one"}, {"text": "three"}]
    assert load_records([source(tmp_path / "a.txt")]).describe(1).endswith("a.txt line 3")
    assert read(source(tmp_path / "a.txt", target_path=str(tmp_path / "b.txt"))) == [
        {"source": "one", "target": "un"},
        {"source": " ", "target": "deux"},
        {"source": "three", "target": ""},
    ]


def test_a_source_of_bad_lines_alone_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("oops\n[1]\n")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "c.jsonl").write_text("\n")
    good, bad, empty = (source(tmp_path / f"{name}.jsonl") for name in "bac")
    said = r"a\.jsonl has no row that can be used: 2 records cannot be used: .*is broken JSON"
    with pytest.raises(UserError, match=said):
        load_records([good, bad], on_bad="drop")
    with pytest.raises(UserError, match=r"c\.jsonl is empty: it has no rows"):
        load_records([good, empty], on_bad="drop")


def test_a_stream_can_be_read_in_another_thread() -> None:
    """As a new tokenizer reads it."""
    records = iter(stream_records([source("package:translation.en-fr.test")]))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: sum(1 for _ in records)).result() == 100


def test_the_demo_data_of_the_package() -> None:
    records = load_records([source("package:translation.en-fr.test")])
    assert len(records) == 100
    assert set(records[0]) == {"translation", "source"}
    with pytest.raises(
        UserError,
        match=r"has no data 'chat\.en\.tset'; it has chat\.en\.test, "
        r".*Did you mean 'chat\.en\.test'",
    ):
        load_records([source("package:chat.en.tset")])


def mixed(tmp_path: Path, weights: tuple[float | None, float | None]) -> list[Source]:
    many = write(tmp_path, "many.jsonl", [{"text": f"a{i}"} for i in range(60)])
    few = write(tmp_path, "few.jsonl", [{"text": f"b{i}"} for i in range(20)])
    return [source(many, weight=weights[0]), source(few, weight=weights[1])]


def test_without_weights_each_record_comes_once_and_evenly_spread(tmp_path: Path) -> None:
    records = [record["text"] for _, record in load_records(mixed(tmp_path, (None, None)))]
    assert Counter(records) == Counter([f"a{i}" for i in range(60)] + [f"b{i}" for i in range(20)])
    assert all(
        sum(text.startswith("b") for text in records[i : i + 4]) == 1 for i in range(0, 80, 4)
    )
    streamed = [record["text"] for _, record in stream_records(mixed(tmp_path, (None, None)))]
    assert sorted(streamed) == sorted(records)
    assert streamed[:6] == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_with_weights_the_shares_are_exact_until_a_source_runs_out(tmp_path: Path) -> None:
    sources = mixed(tmp_path, (1.0, 3.0))
    for records in (load_records(sources), stream_records(sources)):
        texts = [record["text"] for _, record in records]
        assert [text for text in texts if text[0] == "b"] == [f"b{i}" for i in range(20)]
        assert len(texts) in (26, 27)
        assert texts == [record["text"] for _, record in load_records(sources)], (
            "in memory and streamed alike"
        )
    with pytest.raises(UserError, match=r"some have not\. Give every source one, or none"):
        load_records(mixed(tmp_path, (1.0, None)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_interleaving_loses_nothing_and_keeps_the_shares_at_all_times(sizes: list[int]) -> None:
    order = list(_interleave(sizes, None))
    assert sorted(order) == [(k, i) for k, size in enumerate(sizes) for i in range(size)]
    for k, size in enumerate(sizes):
        for n in range(1, len(order) + 1):
            taken = sum(source == k for source, _ in order[:n])
            assert abs(taken - n * size / sum(sizes)) <= len(sizes)


def test_records_are_held_out_at_random_and_for_good(tmp_path: Path) -> None:
    records = load_records(
        [source(write(tmp_path, "data.jsonl", [{"text": str(i)} for i in range(100)]))]
    )

    def texts(part: Records) -> list[str]:
        return [record["text"] for _, record in part]

    train, held_out = split_held_out(records, fraction=0.1, seed=0)
    assert (len(train), len(held_out)) == (90, 10)
    assert sorted(texts(train) + texts(held_out)) == sorted(texts(records))
    assert texts(split_held_out(records, fraction=0.1, seed=0)[1]) == texts(held_out)
    assert texts(split_held_out(records, fraction=0.1, seed=1)[1]) != texts(held_out)
    assert held_out.describe(0).endswith(f"line {int(held_out[0]['text']) + 1}"), (
        "a record keeps its number"
    )
    rest, few = split_held_out(records, fraction=0.5, most=7, seed=0)
    assert (len(rest), len(few)) == (93, 7), "what is not held out is learnt"
    assert len(split_held_out(records.take(2), fraction=0.001, seed=0)[1]) == 1
    assert len(split_held_out(records.take(2), fraction=1.0, seed=0)[0]) == 1
    with pytest.raises(UserError, match="none can be held out"):
        split_held_out(records.take(1), fraction=0.1, seed=0)


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning"
)  # `datasets` leaves a CSV open that is not read to its end
@pytest.mark.parametrize("name", [*KINDS, "data.txt", "mix"])
def test_a_stream_goes_on_from_any_record(name: str, tmp_path: Path) -> None:
    """Also after having gone on once before."""
    if name == "mix":
        sources = mixed(tmp_path, (None, None))
    elif name == "data.txt":
        (tmp_path / name).write_text("".join(f"line {i}\n" for i in range(7)), encoding="utf-8")
        sources = [source(tmp_path / name)]
    else:
        sources = [source(write(tmp_path, name, PAIRS))]
    expected = list(stream_records(sources))
    for stride in (2, 7) if name == "mix" else (1, 3):
        got: list[Any] = []
        state: dict[str, Any] | None = None
        while len(got) < len(expected):
            stream = stream_records(sources)
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
    "blank.jsonl": ("\n\n", "blank.jsonl is empty: it has no rows"),
    "header.csv": ("en,fr\n", "header.csv is empty: it has no rows"),
    "ragged.csv": ("en,fr\na,b\nc,d,e\n", "ragged.csv line 3 has 3 fields, but the header has 2"),
    "data.xml": (
        "<a/>",
        "data.xml has the unknown ending '.xml'; known are .json, .jsonl, .ndjson, .csv, .tsv, "
        ".parquet, .txt, each also with .gz, .zst, .bz2, .xz",
    ),
    "data.parquet": ("no parquet at all", "data.parquet cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name: str, tmp_path: Path) -> None:
    text, expected = BROKEN[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_records([source(tmp_path / name)])
    assert expected in str(caught.value)
    if "is empty: it has no rows" in expected:
        assert list(stream_records([source(tmp_path / name)])) == []
    else:
        with pytest.raises(UserError) as caught:
            list(stream_records([source(tmp_path / name)]))
        assert expected in str(caught.value)


CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
COMPLETION = [{"prompt": "a", "completion": "b"}]


def test_records_of_different_columns_are_read_as_they_are(tmp_path: Path) -> None:
    """No record gets a column of another one."""
    write(tmp_path, "a.jsonl", CHAT)
    write(tmp_path, "b.jsonl", COMPLETION)
    assert read(source(tmp_path)) == CHAT + COMPLETION
    write(tmp_path, "c.jsonl", CHAT + COMPLETION)
    assert read(source(tmp_path / "c.jsonl")) == CHAT + COMPLETION


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_of_different_columns_are_to_be_several_sources(
    streaming: bool, tmp_path: Path
) -> None:
    write(tmp_path, "a.parquet", CHAT)
    write(tmp_path, "b.parquet", COMPLETION)
    read = (lambda sources: list(stream_records(sources))) if streaming else load_records
    with pytest.raises(UserError) as caught:
        read([source(tmp_path)])
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}: its rows do not have the same columns (messages; further on "
    )
    assert message.endswith(
        "Put each kind into files of its own, and list these as several sources"
    )
    names = ("a.parquet", "b.parquet")
    assert len(list(stream_records([source(tmp_path / name) for name in names]))) == 2


MISSING = {
    "nowhere.jsonl": "there is no file or folder 'nowhere.jsonl' (looked in ",
    "./nowhere": "there is no file or folder './nowhere'",
    "nowhere/*.jsonl": "no file matches 'nowhere/*.jsonl' (looked in ",
    "nobody/nothing": "'nobody/nothing' not found: it is not a file or folder here (looked in ",
    "no/such/name/at all": "not found: it is not a file or folder here",
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
        load_records([source(path)])
    assert MISSING[path] in str(caught.value)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_a_missing_split_lists_those_there_are(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, PAIRS)
    with pytest.raises(
        UserError,
        match=r"data\.\w+ \(validation\): unknown split .validation.; "
        r"it should be one of \['train'\]",
    ):
        load_records([source(tmp_path / name, split="validation")])


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", PAIRS)
    write(tmp_path, "b.csv", PAIRS)
    with pytest.raises(
        UserError, match=r"files of several kinds in one source \(csv, json\)\. Make a source of"
    ):
        load_records([source(tmp_path / "*")])


def test_there_was_something_to_check() -> None:
    assert (len(KINDS), len(BROKEN), len(MISSING)) == (5, 11, 5)
