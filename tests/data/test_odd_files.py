"""Files as other programs and people leave them: the right records, or one sentence why not."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.formats.detect import build_format
from finetune.data.sources import load_records, stream_records
from finetune.data.sources.peek import first_records, require_plain_text
from finetune.errors import UserError
from tests.data.settings import format_options, source
from tests.data.stock import MakeTokenizer
from tests.data.test_files import TEXT, everywhere, read, refused

READ: dict[str, tuple[str | bytes, list[dict[str, Any]]]] = {
    # name -> content, the records in it
    "joined.txt": ("\ufeffone\n\ufefftwo\n", [{"text": "one"}, {"text": "two"}]),
    "joined.tsv": ("\ufeffa\tb\nx\ty\n\ufeffz\tw\n", [{"a": "x", "b": "y"}, {"a": "z", "b": "w"}]),
    "joined.jsonl": ('\ufeff{"a": "x"}\n\ufeff{"a": "y"}\n', [{"a": "x"}, {"a": "y"}]),
    "mark of JSON.jsonl": (r'{"a": "\ufeffx"}' + "\n", [{"a": "\ufeffx"}]),
    "marks and lines.csv": ('\ufeff"a","b"\n"\ufeffx\ny",z\n', [{"a": "\ufeffx\ny", "b": "z"}]),
    "blanks first.csv": ("  \n\t\na,b\nx,y\n", [{"a": "x", "b": "y"}]),
    "blanks first.tsv": ("  \na\tb\nx\ty\n", [{"a": "x", "b": "y"}]),
    "empty fields first.csv": (",,\na,b,c\nx,y,z\n", [{"a": "x", "b": "y", "c": "z"}]),
    "mark and sep.csv": ("\ufeffsep=|\r\na|b\r\nx|y\r\n", [{"a": "x", "b": "y"}]),
    "decimal commas.csv": ("a;b\n1,5;2,5\n", [{"a": "1,5", "b": "2,5"}]),
    "index.tsv": ("\ta\n0\tx\n", [{"column 1": "0", "a": "x"}]),
    "return at the end.csv": ("a,b\nx,y\r\r\nz,w", [{"a": "x", "b": "y\r"}, {"a": "z", "b": "w"}]),
    "mixed ends.csv": ("a,b\r\nx,y\nz,w\r\n", [{"a": "x", "b": "y"}, {"a": "z", "b": "w"}]),
    "inches.csv": ('a,b\n6" disk,"y"\n', [{"a": '6" disk', "b": "y"}]),
    "lines.csv": ('a\n"x\n\n\ny"\n', [{"a": "x\n\n\ny"}]),
    "postgres.tsv": ("a\tb\n\\N\tnull\n", [{"a": "\\N", "b": "null"}]),
    "comments.csv": ("a,b\n#x,y\n", [{"a": "#x", "b": "y"}]),
    "one column.csv": ("text\nyes; no\n", [{"text": "yes; no"}]),
    "formulas.csv": ("a,b\n=1+1,@x\n", [{"a": "=1+1", "b": "@x"}]),
    "ends of lines.txt": (
        "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029\ng\r\r\nh\ri",
        [{"text": "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029"}, {"text": "g\r"}, {"text": "h\ri"}],
    ),
    "numbers.jsonl": (
        '{"a": 12345678901234567890123, "b": 1.0, "c": -0.0}\n{"a": "007", "c": [1, "1", null]}\n',
        [{"a": 12345678901234567890123, "b": 1.0, "c": -0.0}, {"a": "007", "c": [1, "1", None]}],
    ),
    "dates.json": (
        '[{"a": "1969-07-20"}, {"a": {"b": ["12:30", "2024-01-01T10:00:00Z"]}}]',
        [{"a": "1969-07-20"}, {"a": {"b": ["12:30", "2024-01-01T10:00:00Z"]}}],
    ),
    "separators.jsonl": ('{"a": "x\u2028y\x85z"}\n', [{"a": "x\u2028y\x85z"}]),
    "one record.json": (
        '{"messages": [{"role": "user"}, {"role": "assistant"}],\n "tools": [{"x": 1}, {"x": 2}]}',
        [{"messages": [{"role": "user"}, {"role": "assistant"}], "tools": [{"x": 1}, {"x": 2}]}],
    ),
    "one question.json": (
        '{"prompt": "a", "completion": "b",\n "tools": [{"x": 1}]}',
        [{"prompt": "a", "completion": "b", "tools": [{"x": 1}]}],
    ),
    "packed.csv.gz": (gzip.compress("\ufeffa;b\nx;y\n".encode()), [{"a": "x", "b": "y"}]),
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", READ)
def test_an_odd_file_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    content, expected = READ[name]
    assert everywhere(write(tmp_path, name, content)) == expected


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "joined.csv": ("\ufeffa,b\nx,y\n\ufeffa,b\nz,w\n", r"line 3 repeats the header\. Remove the l"),
    "joined and quoted.csv": ('a,b\nx,y\n"a","b"\n', r"line 3 repeats the header"),
    "joined with blanks.csv": ("a,b\nx,y\na, b\n", r"line 3 repeats the header"),
    "joined with capitals.csv": ("A,B\nx,y\na,b\n", r"line 3 repeats the header"),
    "joined column.csv": ("text\nx\ntext\ny\n", r"line 3 repeats the header.*or rename the column"),
    "joined column.tsv": ("text\nx\ntext\n", r"line 3 repeats the header"),
    "first broken.jsonl": ('{"a": \n{"a": 1}\n{"a": 2}\n', r"jsonl line 1 is broken JSON"),
    "first broken.json": ('{"a" 1}\n{"a": 1}\n{"a": 2}\n', r"json line 1 is broken JSON"),
    "first cut.jsonl": ('{"a": "x\n{"a": "y"}\n', r"jsonl line 1 is broken JSON: unterminated"),
    "commas at ends.jsonl": ('{"a": 1},\n{"a": 2},\n', r"^2 records .* lines 1, 2 are broken JSON"),
    "lists.jsonl": ('["a", "b"]\n["c", "d"]\n', r"^2 records .* lines 1, 2 must be a JSON object"),
    "lists.json": (
        '[["a", "b"], ["c", "d"]]',
        r"^2 records .*lists\.json line 1 must be a JSON obj",
    ),
    "table.jsonl": ("a,b\nx,y\n", r"is no JSON: it begins with 'a,b'\. If it is a table, name it"),
    "table.json": ("a\tb\nx\ty\n", r"is no JSON: it begins with 'a\\tb'\. If it is a table"),
    "records.csv": (
        '{"a": "x", "b": "y"}\n',
        r"holds JSON, and its name says csv\. Name it \.jsonl",
    ),
    "records.tsv": ('{"a": 1}\n{"a": 2}\n', r"holds JSON, and its name says tsv\. Name it \.jsonl"),
    "two a line.jsonl": ('{"a": 1}{"a": 2}\n{"a": 3}\n', r"line 1 is broken JSON: extra data"),
    "old mac.jsonl": ('{"a": 1}\r{"a": 2}\r', r"line 1 is broken JSON: extra data"),
    "pretty.jsonl": ('{\n "a": 1\n}\n{\n "a": 2\n}\n', r"line 4 is broken JSON: extra data"),
    "texts.jsonl": ('"one"\n"two"\n', r"^2 records .* must be a JSON object"),
    "null.jsonl": ('null\n{"a": 1}\n', r"line 1 must be a JSON object, such as .*not 'null'"),
    "trailing.json": ('[{"a": 1},]', r"line 1 is broken JSON"),
    "scalar.json": ("3", r"must be a JSON object"),
    "utf16.jsonl": ('{"a": 1}\n'.encode("utf-16"), r"is not UTF-8 text \(line 1"),
    "utf32.txt": ("hello\n".encode("utf-32"), r"is not UTF-8 text \(line 1"),
    "packed.parquet.gz": (b"PAR1", r"is a compressed Parquet file\. Decompress it"),
    "table.xlsx": (b"PK", r"has the unknown ending '\.xlsx'; known are"),
    "table.csv.zip": (b"PK", r"has the unknown ending '\.zip'"),
    "return in the header.csv": ('"a\r",b\nx,y\n', r"ends its lines with carriage returns alone"),
    "after a quote.csv": ('a,b\n"x" y,z\n', r"line 2 has a quotation mark within a field in quot"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    content, expected = REFUSED[name]
    message = refused(write(tmp_path, name, content))
    assert re.search(expected, message), message


def test_the_first_line_may_be_the_broken_one(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": \n{"a": 1}\n{"a": 2}\n')
    for records in (
        load_records([source(path)], on_bad="drop"),
        stream_records([source(path)], on_bad="drop"),
    ):
        assert [record for _, record in records] == [{"a": 1}, {"a": 2}]
        assert records.bad.count == 1


@pytest.mark.parametrize("separator", [":", "^", "~", "\x01", "\x1f", "#", "/", "¦"])
def test_another_separator_is_named(
    separator: str, tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    path = write(tmp_path, "a.csv", f"en{separator}fr\nHello{separator}Bonjour\n")
    [record] = read(source(path))
    with pytest.raises(UserError) as caught:
        build_format("auto", format_options(), tokenizer=make_tokenizer(), first_record=record)
    assert f"If the fields are separated by {separator!r}, save the file with" in str(caught.value)


NOT_TEXT = {  # the lines of a .txt file -> what it should be named
    '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n': ".jsonl",
    '\n{"prompt": "a", "completion": "b"}\n': ".jsonl",
    '[\n  {"prompt": "a", "completion": "b"}\n]\n': ".json",
    '[{"prompt": "a", "completion": "b"}]': ".json",
    "question\tanswer\nHello\tHi there\n": ".tsv",
    "Hello\tBonjour\nBye\tSalut\n": ".tsv",
    "question,answer\nHello,Hi\n": ".csv",
    '"en";"de"\nHello;Hallo\n': ".csv",
}
PLAIN = [
    "It was, of course, late.\nAnd so, my dear, it ended.\n",
    "# Title\n\tone\n\ttwo\n",
    '"Hello"\n"Bye"\n',
    "[1] A footnote.\n[1]\n12\n",
    "a, b\n",
    "",
]


@pytest.mark.parametrize("lines", NOT_TEXT)
def test_a_text_file_with_something_else_in_it_is_refused(lines: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt.gz", gzip.compress(lines.encode()))
    with pytest.raises(UserError) as caught:
        require_plain_text([path])
    assert f"Name it {NOT_TEXT[lines]}, or set data.format=text" in str(caught.value)


@pytest.mark.parametrize("lines", PLAIN)
def test_a_text_file_with_text_is_taken(lines: str, tmp_path: Path) -> None:
    require_plain_text([write(tmp_path, "a.txt", lines)])


PARQUET: dict[str, tuple[pyarrow.Array, list[Any]]] = {
    "dates that are text": (pyarrow.array(["1969-07-20", "NA"]), ["1969-07-20", "NA"]),
    "large text": (pyarrow.array(["x", None], pyarrow.large_string()), ["x", None]),
    "views": (pyarrow.array(["x", "y"], pyarrow.string_view()), ["x", "y"]),
    "categories": (pyarrow.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
    "lists of structs": (
        pyarrow.array([[{"role": "user", "content": "2024-01-01"}]]),
        [[{"role": "user", "content": "2024-01-01"}]],
    ),
    "nulls that Parquet had to add": (
        pyarrow.array([{"a": [{"city": "Oslo"}, {"day": "today"}]}, {"a": None}, None]),
        [{"a": [{"city": "Oslo"}, {"day": "today"}]}, {}, None],
    ),
    "a struct of lists": (
        pyarrow.array([{"role": ["user", "assistant"], "content": ["a", "b"]}]),
        [{"role": ["user", "assistant"], "content": ["a", "b"]}],
    ),
}


@pytest.mark.parametrize("case", PARQUET)
def test_a_column_of_parquet_is_read_as_it_is(case: str, tmp_path: Path) -> None:
    column, expected = PARQUET[case]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), path)
    assert everywhere(path) == [{"a": value} for value in expected]


@pytest.mark.parametrize(
    "looked", [lambda files: next(first_records(files)), lambda files: read(source(files[0]))]
)
def test_a_parquet_file_without_rows_is_empty(looked: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match=r"a\.parquet is empty: it has no rows"):
        looked([path])


HEADERLESS = {
    "What is 2+2?,It is 4.\nWhat is 3+3?,It is 6.\n": " If the file has no header line, add one",
    "Hello,Bonjour\nBye,Salut\n": "; a table needs a header line",
}


@pytest.mark.parametrize("lines", HEADERLESS)
def test_a_table_without_a_header_is_told(
    lines: str, tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    [record] = read(source(write(tmp_path, "a.csv", lines)))
    with pytest.raises(UserError) as caught:
        build_format("auto", format_options(), tokenizer=make_tokenizer(), first_record=record)
    assert HEADERLESS[lines] in str(caught.value)


def test_bytes_that_are_no_text_in_parquet_are_told(tmp_path: Path) -> None:
    offsets = pyarrow.array([0, 1], pyarrow.int32()).buffers()[1]
    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff")]
    )
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as Parquet: .*utf-8"):
        next(first_records([path]))
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: .utf-8"):
        read(source(path))


def test_pictures_and_sounds_stay_as_they_are_stored(tmp_path: Path) -> None:
    stored = {"bytes": b"not decoded", "path": "a.png"}
    media = {"image": "Image", "audio": "Audio"}
    features = {
        **{name: {"_type": kind} for name, kind in media.items()},
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        "question": {"dtype": "string", "_type": "Value"},
    }
    table = pyarrow.table(
        {**{name: [stored] for name in media}, "images": [[stored]], "question": ["What?"]}
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    expected = {"image": stored, "audio": stored, "images": [stored], "question": "What?"}
    assert everywhere(path) == [expected]


def test_a_map_of_parquet_is_refused_in_a_sentence(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    column = pyarrow.array([[("en", "a"), ("fr", "b")]], kind)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"translation": column}), path)
    message = refused(path)
    assert "has a column of the type map<string, string" in message
    assert "Write it as a struct or as text" in message


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5),
    st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.parquet"]),
)
def test_what_pandas_writes_is_read_back(
    tmp_path: Path, rows: list[tuple[str, str]], name: str
) -> None:
    """With its index, which is one more column."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows, columns=["a", "b"], dtype=object)
    path = tmp_path / name
    for other in tmp_path.iterdir():
        other.unlink()
    expected: list[dict[str, Any]] = [{"a": a, "b": b} for a, b in rows]
    if name == "a.jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    elif name == "a.parquet":
        frame.to_parquet(path, index=False)
    else:
        text = frame.to_csv(sep="\t" if name == "a.tsv" else ",", lineterminator="\r\n")
        path.write_bytes(text.encode())
        expected = [{"column 1": str(n)} | record for n, record in enumerate(expected)]
    if name == "a.parquet":  # hashed and copied by `datasets`: the slow one
        assert read(source(path)) == expected
    else:
        assert everywhere(path) == expected


def test_there_was_something_to_check() -> None:
    assert (len(READ), len(REFUSED), len(PARQUET)) == (26, 30, 7)
