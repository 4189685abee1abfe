"""Files are read as they are: the same records by name, by glob, in a folder and in a stream."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from finetune.data.sources import load_records, stream_records
from finetune.errors import UserError
from finetune.run.marker import MARKER
from tests.data.settings import source

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a file, of text or bytes, and returns its path."""

    def write(name: str, content: str | bytes, *, alone: bool = False) -> Path:
        path = tmp_path / name
        for other in path.parent.iterdir() if alone else ():
            other.unlink()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read(*sources: Any) -> list[dict[str, Any]]:
    return [dict(record) for _, record in load_records(sources)]


def everywhere(path: Path, *, folder: bool = True) -> list[dict[str, Any]]:
    """Read a file by name, by glob, in its folder, each also as a stream, and compare."""
    glob = path.parent / f"{path.name[:1]}*{path.suffix}"
    ways = [source(path), source(glob), *([source(path.parent)] if folder else [])]
    found = [read(way) for way in ways]
    found += [[dict(record) for _, record in stream_records([way])] for way in ways]
    assert len(found) >= 4
    assert all(each == found[0] for each in found)
    return found[0]


def refused(path: Path) -> str:
    """Return what is said of a file that cannot be read, in memory and as a stream."""
    with pytest.raises(UserError) as caught:
        load_records([source(path)])
    with pytest.raises(UserError) as streamed:
        list(stream_records([source(path)]))
    if "cannot be used" in str(caught.value):  # a stream is refused at its first bad line
        assert str(streamed.value).split(" line ")[0] in str(caught.value)
    else:
        assert str(streamed.value) == str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tables

READ: dict[str, tuple[str, list[dict[str, str]]]] = {
    "semicolons.csv": ("a;b\nx, y;z\n", [{"a": "x, y", "b": "z"}]),
    "semicolons quoted.csv": ('"a";"b"\n"x;y";"z"\n', [{"a": "x;y", "b": "z"}]),
    "tabs.csv": ("a\tb\nx, y\tz\n", [{"a": "x, y", "b": "z"}]),
    "bars.csv": ("a|b\nx|z\n", [{"a": "x", "b": "z"}]),
    "commas.tsv": ("a,b\nx,z\n", [{"a": "x", "b": "z"}]),
    "a comma in a name.csv": ("name, first;b\nx;z\n", [{"name, first": "x", "b": "z"}]),
    "excel.csv": ("sep=;\r\na;b\r\nx;z\r\n", [{"a": "x", "b": "z"}]),
    "index of pandas.csv": (",a,b\n0,x,y\n", [{"column 1": "0", "a": "x", "b": "y"}]),
    "comma at each end.csv": ("a,b,\nx,y,\n", [{"a": "x", "b": "y", "column 3": ""}]),
    "mark and quotes.csv": ('\ufeff"a","b"\r\n"x","y"\r\n', [{"a": "x", "b": "y"}]),
    "mark.csv": ("\ufeffa,b\nx,y\n", [{"a": "x", "b": "y"}]),
    "mark.tsv": ("\ufeffa\tb\nx\ty\n", [{"a": "x", "b": "y"}]),
    "blank first.csv": ("\n\na,b\nx,y\n", [{"a": "x", "b": "y"}]),
    "blank lines.csv": ("a,b\n\nx,y\n\n\n", [{"a": "x", "b": "y"}]),
    "blank lines.tsv": ("a\tb\n\nx\ty\n\n\n", [{"a": "x", "b": "y"}]),
    "blank texts.tsv": ("a\nx\n\ny\n", [{"a": "x"}, {"a": ""}, {"a": "y"}]),
    "blanks.csv": ("a, b\n x , y\n", [{"a": " x ", "b": " y"}]),
    "blanks before quotes.csv": ('a, b\n"x", "y, z"\n', [{"a": "x", "b": "y, z"}]),
    "blanks in a header.csv": ('"a"; "b"\n x; y\n', [{"a": "x", "b": "y"}]),
    "speech after a comma.csv": ('a,b\nx, "y" z\n', [{"a": "x", "b": ' "y" z'}]),
    "a quoted blank.csv": (
        'a,b\nx," ""y"""\nx, y\n',
        [{"a": "x", "b": ' "y"'}, {"a": "x", "b": " y"}],
    ),
    "lone return.csv": ("a\nfirst\rsecond\nx\n", [{"a": "first\rsecond"}, {"a": "x"}]),
    "lone returns.csv": ('a,b\nx\ry,"z\r"\n', [{"a": "x\ry", "b": "z\r"}]),
    "lone return.tsv": ("a\tb\nx\ry\tz\n", [{"a": "x\ry", "b": "z"}]),
    "lines in a field.csv": ('a,b\r\n"x\r\ny","z\nw"\r\n', [{"a": "x\r\ny", "b": "z\nw"}]),
    "quotes.csv": ('a,b\n"say ""hi""",5" disk\n', [{"a": 'say "hi"', "b": '5" disk'}]),
    "no last end.csv": ("a,b\nx,y", [{"a": "x", "b": "y"}]),
    "other ends.csv": ("a\nx\u2028y\x85z\x0bw\x00\n", [{"a": "x\u2028y\x85z\x0bw\x00"}]),
    "nothing is missing.csv": (
        "a,b\nNone,NA\nnull,NaN\n,nan\n",
        [{"a": "None", "b": "NA"}, {"a": "null", "b": "NaN"}, {"a": "", "b": "nan"}],
    ),
    "numbers and dates.csv": (
        "a,b\n007,1e3\n1969-07-20,True\n",
        [{"a": "007", "b": "1e3"}, {"a": "1969-07-20", "b": "True"}],
    ),
    "quotes are text.tsv": (
        'a\tb\n"Stop!\tArrête !\nHe said "go\tva »\nx"\ty\n',
        [
            {"a": '"Stop!', "b": "Arrête !"},
            {"a": 'He said "go', "b": "va »"},
            {"a": 'x"', "b": "y"},
        ],
    ),
    "speech is text.tsv": (
        'a\tb\n"Hello"\t"Bonjour"\nx\ty\n',
        [{"a": '"Hello"', "b": '"Bonjour"'}, {"a": "x", "b": "y"}],
    ),
    "all quoted.tsv": ('"a"\t"b"\n"x"\t"y ""z"""\n', [{"a": "x", "b": 'y "z"'}]),
    "of pandas.tsv": (
        'a\tb\nx\t"say ""hi"""\ny\tz\n',
        [{"a": "x", "b": 'say "hi"'}, {"a": "y", "b": "z"}],
    ),
    "of Excel.tsv": (
        'a\tb\r\n"Hello, you"\t"say ""hi"""\r\ny\tz\r\n',
        [{"a": "Hello, you", "b": 'say "hi"'}, {"a": "y", "b": "z"}],
    ),
    "of R.tsv": (
        '"a"\t"n"\n"x ""y"", z"\t1\n"w"\tNA\n"-"\t-2.5e-07\n',
        [{"a": 'x "y", z', "n": "1"}, {"a": "w", "n": "NA"}, {"a": "-", "n": "-2.5e-07"}],
    ),
    "speech with a comma is text.tsv": (
        'a\tb\n"Hello, you"\t"Bonjour, toi"\nx, y\tz\n',
        [{"a": '"Hello, you"', "b": '"Bonjour, toi"'}, {"a": "x, y", "b": "z"}],
    ),
    "speech alone with a comma is text.tsv": (
        'a\tb\nx\t"Hi, he said"\n',
        [{"a": "x", "b": '"Hi, he said"'}],
    ),
    "a long field.csv": ("a\n" + "x" * 200_000 + "\n", [{"a": "x" * 200_000}]),
    "a long header.csv": ("x" * 200_000 + "\nb\n", [{"x" * 200_000: "b"}]),
}


@pytest.mark.parametrize("name", READ)
def test_a_table_is_read_as_it_is(name: str, write: Write) -> None:
    text, expected = READ[name]
    assert everywhere(write(name, text)) == expected


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "score.tsv": (
        "en\tfr\nHello\tBonjour\t0.98\nBye\tSalut\t0.91\n",
        r"^2 records cannot be used: .*score\.tsv lines 2, 3 have 3 fields, but the header has 2"
        r"\. Remove the tab, or name every field in the header$",
    ),
    "a blank before quotes.csv": (
        'a,b\nx,y\nx, "y"\nz, " " \n',
        r"quotes\.csv lines 3, 4 have a blank before a field in quotation marks\. Remove the blank",
    ),
    "first only.csv": ("text\nHello, world\nx\n", r"line 2 has 2 fields, but the header has 1\."),
    "later only.csv": ("a,b\nx,y\n\nz,v,w\n", r"later only\.csv line 4 has 3 fields"),
    "after long rows.csv": (
        'a,b\n"x\n\ny",z\nv\n',
        r"csv line 5 has 1 field, but the header has 2$",
    ),
    "short.csv": ("a,b\nx,y\nz\n", r"line 3 has 1 field, but the header has 2$"),
    "comma at each row.csv": ("a,b\nx,y,\n", r"line 2 has 3 fields, .* name every field in the"),
    "twice.csv": ("en,fr,fr\na,b,c\n", r"names the column 'fr' twice\. Rename or remove one"),
    "twice.tsv": ("en\ten \na\tb\n", r"names the column 'en' twice"),
    "joined.csv": ("a,b\nx,y\na,b\nz,w\n", r"joined\.csv line 3 repeats the header\. Remove"),
    "backslashes.csv": (
        'a,b\n"Say \\"hi\\"",x\n',
        r"line 2 has a quotation mark within a field in",
    ),
    "open.csv": ('a,b\n"x,y\nz,w\n', r"line 2 opens a quotation mark that is never closed\. Close"),
    "old mac.csv": ("a,b\rx,y\rz,w\r", r"ends its lines with carriage returns alone\. Save it"),
    "latin.csv": (
        b"a,b\nx,\xe9t\xe9\n",
        r"latin\.csv is not UTF-8 text \(line 2: .* Save the file as",
    ),
    "utf16.csv": ("a,b\nx,y\n".encode("utf-16"), r"utf16\.csv is not UTF-8 text \(line 1"),
    "half.jsonl": ('{"a": "x"}\n{"a": "\\ud83d"}\n', r"half\.jsonl line 2 has half of a surrogate"),
    "half.json": ('["fine", "half \\ud83d"]', r"half\.json line 1 has half of a surrogate"),
    "twin.jsonl": ('{"a": 1, "a": 2}\n', r"line 1 is broken JSON: the key 'a' is there twice"),
    "inner twin.json": ('[{"b": {"a": 1, "a": 2}}]', r"line 1 is broken JSON: the key 'a'"),
    "deep.jsonl": ("[" * 99_999, r"broken JSON: .*"),
    "digits.jsonl": ('{"a": ' + "1" * 5000 + "}\n", r"line 1 is broken JSON: exceeds the limit"),
    "wrapped.json": (
        '{"version": "1", "data": [{"instruction": "x", "output": "y"}]}',
        r"holds one object with the records in its key 'data'\. Write that list alone",
    ),
    "columns.json": ('{"a": ["x", "y"], "b": ["z", "w"]}', r"one object with a list for each col"),
    "all wrong.json": ('[{"a": "x"},\n 3,\n [4]]', r"^2 records .*lines 2, 3 must be a JSON"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": "x"}\n' * 99)[:-20], r"is not a whole \.gz file"),
    "no.csv.gz": (b"a,b\nx,y\n", r"no\.csv\.gz is not a whole \.gz file .* Compress it again"),
    "no.csv.zst": (b"a,b\nx,y\n", r"no\.csv\.zst is not a whole \.zst file"),
    "no.csv.xz": (b"a,b\nx,y\n", r"no\.csv\.xz is not a whole \.xz file"),
    "no.csv.bz2": (b"a,b\nx,y\n", r"no\.csv\.bz2 is not a whole \.bz2 file"),
    "only.gz": (gzip.compress(b"a"), r"only\.gz has the unknown ending '\.gz'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_line(name: str, write: Write) -> None:
    content, expected = REFUSED[name]
    message = refused(write(name, content))
    assert re.search(expected, message), message


def test_bad_lines_are_listed_or_dropped_and_counted(write: Write) -> None:
    lines = ['{"a": "x"}', "oops", '{"a": "y"}', *['{"a"'] * 30]
    path = write("a.jsonl", "\n".join(lines) + "\n")
    message = refused(path)
    assert message.startswith(f"31 records cannot be used: {path} line 2 is broken JSON")
    assert f"{path} lines 4, 5, 6, " in message
    assert "; and 11 more. Mend them" in message
    for records in (
        load_records([source(path)], on_bad="drop"),
        stream_records([source(path)], on_bad="drop"),
    ):
        assert list(records) == [(f"{path} line 1", {"a": "x"}), (f"{path} line 3", {"a": "y"})]
        assert records.bad.count == 31


# A byte order mark at the start of a line is no text.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff")
TEXT = st.text(CHARACTERS, max_size=8) | st.sampled_from(
    ["NA", "null", "1969-07-20", '"', '""', "'", "a,b", "a;b", "x\ty", "\n", "\r\n", "\r", " ", "#",
     "\\", "\ufdd0", "\u2028"]
)  # fmt: skip
SMALL = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, str]]:
    columns = draw(st.integers(1, 4))
    rows = st.lists(TEXT, min_size=columns, max_size=columns)
    names = [f"c{n}" for n in range(columns)]
    return [dict(zip(names, row)) for row in draw(st.lists(rows, min_size=1, max_size=5))]


@SMALL
@given(
    tables(),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from([("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")]),
    st.booleans(),
)
def test_what_the_csv_module_writes_is_read_back(
    write: Write,
    rows: list[dict[str, str]],
    end: str,
    quoting: Any,
    kind: tuple[str, str],
    mark: bool,
) -> None:
    name, delimiter = kind
    assume(end == "\r\n" or not any("\r" in text for row in rows for text in row.values()))
    if len(rows[0]) == 1 and delimiter != ",":
        assume(not any(mark in text for row in rows for mark in ",;\t|" for text in row.values()))
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(rows[0]), delimiter=delimiter, quoting=quoting, lineterminator=end
    )
    writer.writeheader()
    writer.writerows(rows)
    path = write(name, text.getvalue().encode("utf-8-sig" if mark else "utf-8"), alone=True)
    assert everywhere(path) == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@SMALL
@given(
    st.lists(st.dictionaries(TEXT, JSON, max_size=4), min_size=2, max_size=5),
    st.sampled_from(["a.jsonl", "a.ndjson", "a.json"]),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_what_the_json_module_writes_is_read_back(
    write: Write, records: list[dict[str, Any]], name: str, indent: int | None, ascii: bool
) -> None:
    """Whatever keys the records have: no type is guessed, and no key is added."""
    if name == "a.json":
        text = json.dumps(records, indent=indent, ensure_ascii=ascii)
    else:
        text = "".join(json.dumps(record, ensure_ascii=ascii) + "\n" for record in records)
    assert everywhere(write(name, text, alone=True), folder=name != "a.ndjson") == records


@SMALL
@given(st.lists(TEXT.filter(lambda text: "\n" not in text), min_size=1, max_size=6), st.booleans())
def test_the_lines_of_a_text_are_its_records(write: Write, lines: list[str], last: bool) -> None:
    """All but the blank ones."""
    assume(not any(line.endswith("\r") for line in lines))
    assume(not lines[0].startswith("\ufeff"))
    assume(last or lines[-1] != "")
    assume(any(line.strip() for line in lines))
    path = write("a.txt", "\n".join(lines) + "\n" * last)
    assert everywhere(path) == [{"text": line} for line in lines if line.strip()]
    mark = write("a.txt", "\ufeff" + "\r\n".join(lines) + "\r\n" * last)
    assert everywhere(mark) == [{"text": line} for line in lines if line.strip()]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_a_stream_goes_on_where_it_stopped(name: str, stride: int, write: Write) -> None:
    """Also in fields of several lines, over the end of a file, and in compressed files."""
    texts = [f'é {n} "\n\n\r,' for n in range(7)]
    rows = {
        ".csv": "a,b\n" + "".join('"' + t.replace('"', '""') + '",x\n\n' for t in texts),
        ".tsv": "a\tb\n" + "".join(f"é {n}\tx\n\n" for n in range(7)),
        ".jsonl": "".join(json.dumps({"a": t}) + "\n\n" for t in texts),
        ".json": json.dumps([{"a": t} for t in texts], indent=2),
        ".txt": "".join(f"é {n}\n\n" for n in range(7)),
    }[Path(name).suffix].encode()
    write("0" + name, rows)
    write("1" + name + ".gz", gzip.compress(rows))
    path = write("2" + name + ".zst", pyarrow.compress(rows, codec="zstd", asbytes=True)).parent
    sources = [source(path / "[012]*")]
    expected = list(stream_records(sources))
    assert [record for _, record in expected] == read(*sources)
    assert len(expected) == 21
    got: list[Any] = []
    state = None
    while len(got) < len(expected):
        stream = stream_records(sources)
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
        got += islice(stream, stride)
        state = stream.state_dict()
    assert got == expected


# Names


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".ndjson", ".Json"])
@pytest.mark.parametrize("compression", ["", ".gz", ".GZ", ".zst", ".bz2", ".xz"])
def test_endings_that_people_use(ending: str, compression: str, write: Write) -> None:
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }[compression.lower()]
    path = write("train" + ending + compression, pack(b'{"a": "x"}\n' * 3))
    assert everywhere(path) == [{"a": "x"}] * 3


@pytest.mark.parametrize("name", ["data[1].jsonl", "a*.jsonl", "a?.jsonl"])
def test_a_name_that_exists_wins_over_a_glob(name: str, write: Write) -> None:
    write("data1.jsonl", '{"a": "other"}\n')
    write("ab.jsonl", '{"a": "other"}\n')
    path = write(name, '{"a": "this"}\n')
    assert read(source(path)) == [{"a": "this"}]
    path.unlink()
    assert read(source(path)) == [{"a": "other"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_with_brackets_in_its_name(kind: str, tmp_path: Path) -> None:
    for name in ("dir[v2]", "dirv"):
        (tmp_path / name).mkdir()
        records = datasets.Dataset.from_list([{"a": name}])
        write_to = records.to_json if kind == "jsonl" else records.to_parquet
        write_to(str(tmp_path / name / f"x[1].{kind}"))
    assert read(source(tmp_path / "dir[v2]")) == [{"a": "dir[v2]"}]
    assert read(source(tmp_path / "dir[v2]" / f"x[1].{kind}")) == [{"a": "dir[v2]"}]


def test_home_is_known_in_every_kind_of_name(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("d/a.jsonl", '{"a": "x"}\n')
    for name in ("~/d/a.jsonl", "~/d/*.jsonl", "~/d"):
        assert read(source(name)) == [{"a": "x"}]


def test_a_name_may_begin_with_a_tilde(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No user has such a name, so it is that of a file."""
    monkeypatch.chdir(tmp_path)
    write("~no such user.csv", "a\nx\n")
    (tmp_path / "~no such folder").mkdir()
    write("~no such folder/a.csv", "a\nx\n")
    for name in ("~no such user.csv", "~no such us*.csv", "~no such folder"):
        assert read(source(name)) == [{"a": "x"}]
    write("~no such user.en", "one\n")
    write("~no such user.fr", "un\n")
    assert read(source("~no such user.en")) == [{"en": "one", "fr": "un"}]
    with pytest.raises(UserError, match="there is no file or folder '~none at all'"):
        load_records([source("~none at all")])


def test_text_that_looks_like_a_date_stays_text(write: Write) -> None:
    """Also in nested fields, and when another file of the source has other text."""
    stamp = "2024-01-01T10:00:00"
    records = [
        {"a": "blue", "b": {"en": "blue", "fr": ["bleu"]}},
        {"a": "1969-07-20", "b": {"en": stamp, "fr": [stamp]}},
        {"a": "NA", "b": {"en": "null", "fr": ["None"]}},
    ]
    paths = [write(f"d/{n}.jsonl", json.dumps(r) + "\n") for n, r in enumerate(records)]
    assert read(source(paths[0].parent)) == records
    assert read(source(paths[1].parent / "[12].jsonl")) == records[1:]
    assert [record for _, record in load_records([source(path) for path in paths])] == records


def test_data_that_changed_under_the_same_time_stamp_is_read_anew(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        path = tmp_path / name
        for value in ("first", "other"):
            data = datasets.Dataset.from_list([{"a": value}])
            {".jsonl": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}[path.suffix](
                str(path)
            )
            os.utime(path, (1_700_000_000, 1_700_000_000))
            assert read(source(path)) == [{"a": value}]


def test_a_file_that_changes_while_it_is_read_is_refused(write: Write) -> None:
    path = write("a.jsonl", '{"a": "x"}\n{"a": "y"}\n')
    records = load_records([source(path)])
    path.write_text('{"a": "z"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read\. Start again"):
        list(records)


def test_parts_of_a_split(write: Write) -> None:
    for name in ("a.jsonl", "a.txt", "a.csv"):
        text = "".join(f'{{"text": "{n}"}}\n' if name == "a.jsonl" else f"{n}\n" for n in range(10))
        path = write(name, ("text\n" if name == "a.csv" else "") + text)
        assert [r["text"] for r in read(source(path, split="train[:3]"))] == ["0", "1", "2"]
        assert [r["text"] for r in read(source(path, split="train[-1:]+train[20%:30%]"))] == [
            "9",
            "2",
        ]
        with pytest.raises(UserError, match="a part of a split cannot be streamed"):
            stream_records([source(path, split="train[:3]")])
        for read_it in (load_records, stream_records):
            with pytest.raises(UserError, match=r"unknown split .test.; it should be one of \['tr"):
                read_it([source(path, split="test[:3]")])


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"a": "x"}, {"a": "y"}])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.take(1)}).save_to_disk(str(tmp_path / "two"))
    assert read(source(tmp_path / "one")) == [{"a": "x"}, {"a": "y"}]
    two = source(tmp_path / "two", split="test")
    assert read(two) == [dict(record) for _, record in stream_records([two])] == [{"a": "x"}]
    with pytest.raises(UserError, match=r"unknown split 'dev'; it should be one of \['train', 'te"):
        load_records([source(tmp_path / "two", split="dev")])


def test_a_folder_has_its_splits_and_one_kind_of_data(write: Write, tmp_path: Path) -> None:
    write("d/train.csv", "a\nx\n")
    write("d/test.csv", "a\ny\n")
    write("d/LICENSE.txt", "Do.\n")
    assert read(source(tmp_path / "d")) == [{"a": "x"}]
    assert read(source(tmp_path / "d", split="test")) == [{"a": "y"}]
    assert read(source(tmp_path / "d", split="train+test")) == [{"a": "x"}, {"a": "y"}]
    write("e/a.csv", "a\nx\n")
    write("e/b.jsonl", '{"a": "y"}\n')
    with pytest.raises(UserError, match=r"files of several kinds in one source \(csv, json\)"):
        load_records([source(tmp_path / "e")])
    write("e/README.md", "---\nconfigs:\n- config_name: one\n  data_files: b.jsonl\n---\n")
    assert read(source(tmp_path / "e", name="one")) == [{"a": "y"}]


LOST: list[tuple[str, str, str, str]] = [
    # files, those that would not be read, the one whose name says a split, what the glob ends in
    ("train.jsonl faq.jsonl more.jsonl", "faq.jsonl and more.jsonl", "train.jsonl", "d/*.jsonl"),
    ("my_test.jsonl faq.jsonl", "faq.jsonl", "my_test.jsonl", "d/*.jsonl"),
    ("train.py faq.csv", "faq.csv", "train.py", "d/*.csv"),
    ("train/a.jsonl b.jsonl", "b.jsonl", "train/a.jsonl", "d/**/*.jsonl"),
    ("dev.jsonl old/b.jsonl", "old/b.jsonl", "dev.jsonl", "d/**/*.jsonl"),
    ("train.txt faq.jsonl", "faq.jsonl", "train.txt", "d/*.jsonl"),
    ("val.csv 1.csv 2.csv 3.csv 4.csv 5.csv", "1.csv, 2.csv, 3.csv and 2 more", "val.csv",
     "d/*.csv"),
]  # fmt: skip


@pytest.mark.parametrize("case", LOST)
def test_no_file_of_a_folder_is_lost_to_the_name_of_another(
    case: tuple[str, str, str, str], tmp_path: Path
) -> None:
    names, lost, cause, glob = case
    for name in names.split():
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a\nx\n" if name.endswith("csv") else '{"a": "x"}\n')
    for split in ("train", "test"):
        for read_it in (load_records, stream_records):
            with pytest.raises(UserError) as caught:
                read_it([source(tmp_path / "d", split=split)])
            message = str(caught.value)
            expected = f": {lost} would not be read, since the name of {cause} makes it the split "
            assert expected in message
            assert message.endswith(f"{glob}'")
    ending = Path(glob).suffix
    files = [name for name in names.split() if name.endswith(ending)]
    assert len(read(source(message.split("'")[-2]))) == len(files)


IN_CAPITALS = {  # files -> those of another split
    "Train.jsonl Test.jsonl": "Test.jsonl",
    "train/a.jsonl train/my_DEV-1.jsonl": "train/my_DEV-1.jsonl",
    "Train/a.jsonl Eval/a.jsonl Eval/b.jsonl": "Eval/a.jsonl and Eval/b.jsonl",
    "Train.jsonl a.Latest.jsonl TEST.md Testament.jsonl": None,
}


@pytest.mark.parametrize("names", IN_CAPITALS)
def test_no_file_is_trained_on_whose_name_says_another_split(names: str, tmp_path: Path) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"a": "x"}\n')
    if IN_CAPITALS[names] is None:
        assert len(read(source(f"{tmp_path}/../{tmp_path.name}"))) == 3
        return
    for read_it in (load_records, stream_records):
        with pytest.raises(UserError, match=f": {IN_CAPITALS[names]} would be trained on"):
            read_it([source(tmp_path)])


def test_a_folder_of_splits_may_hold_other_things(write: Write, tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", ".hidden.jsonl", "notes.txt", "config.json"):
        write(f"d/{name}", '{"a": "x"}\n')
    (tmp_path / "d/run/samples").mkdir(parents=True)
    write(f"d/run/{MARKER}", "{}")
    write("d/run/metrics.jsonl", '{"b": "x"}\n')
    assert read(source(tmp_path / "d")) == [{"a": "x"}]


def test_a_folder_without_training_data_names_the_split_that_it_has(
    write: Write, tmp_path: Path
) -> None:
    write("d/my test.csv", "a\nx\n")
    write("d/eval.csv", "a\ny\n")
    for read_it in (load_records, stream_records):
        with pytest.raises(UserError, match=r"d has no split .train.: .*csv is in the split .te"):
            read_it([source(tmp_path / "d")])
    assert len(read(source(tmp_path / "d", split="test"))) == 2


# Aligned text files


def test_the_other_side_of_a_translation_is_found_beside_it(write: Write) -> None:
    english = write("corpus.en", "\ufeffone\r\ntwo\n")
    french = write("corpus.fr", "\ufeffun\r\ndeux\n")
    expected = [{"en": "one", "fr": "un"}, {"en": "two", "fr": "deux"}]
    assert read(source(english)) == expected
    assert [record for _, record in stream_records([source(english)])] == expected
    assert read(source(french)) == [dict(reversed(list(pair.items()))) for pair in expected]
    write("corpus.de", "eins\nzwei\n")
    with pytest.raises(UserError, match=r"and corpus\.de, corpus\.fr with another language's"):
        load_records([source(english)])
    assert read(source(english, target_path=str(french))) == expected
    with pytest.raises(UserError, match="and no file with another language's ending is beside it"):
        load_records([source(write("alone.en", "one\n"))])


def test_there_was_something_to_check() -> None:
    assert (len(READ), len(REFUSED), len(LOST)) == (40, 30, 7)
