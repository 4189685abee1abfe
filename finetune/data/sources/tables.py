"""CSV and TSV files: how one is laid out, and its rows.

Every value is the text in the file. CSV is read as RFC 4180 has it, with commas, semicolons, tabs
or bars. In TSV a quotation mark is plain text, unless the whole file is exactly what a program
writes that puts fields in quotation marks: Excel, R, pandas.
"""

import csv
import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.sources.files import Lines, open_bytes, without_end
from finetune.data.sources.json_files import looks_like_json
from finetune.errors import UserError

_SEPARATORS = {"csv": ",;\t|", "tsv": "\t,;|"}  # tried in this order
_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?')  # Excel's own first line
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|NA|NaN|[-+]?Inf|TRUE|FALSE", re.I)  # R's
_SPACED = re.compile(r' +"')  # a field after a blank: its quotation marks are read as text
_ALL_SPACED = re.compile(r' +"[^"]+" *')
_ESCAPE = "\ufdd0"  # before 1: a lone \r, which the csv module would take for the end of a row


@dataclass(frozen=True)
class TableLayout:
    """How the rows of a file are read: the names of its columns, and what separates fields."""

    file: Path
    columns: tuple[str, ...]
    separator: str
    quoted: bool
    spaced: bool  # blanks before a field are no text

    def records(self, lines: Lines) -> Iterator[tuple[int, dict[str, str] | str]]:
        """Yield (line, row) for what follows; at the start of the file the header is passed over.

        Instead of a row that cannot be used there is what is wrong with it. Raises UserError for
        quotation marks that do not fit.
        """
        rows = _fields(lines, self.separator, quoted=self.quoted, spaced=self.spaced)
        if lines.offset == 0:
            next(rows, None)
        header = _folded(self.columns)
        for number, fields, raw in rows:
            if fields == [""] and len(self.columns) > 1 and not self.quoted:
                continue  # a blank line
            if len(fields) != len(self.columns):
                yield number, self._problem(len(fields))
            elif _folded(fields) == header:
                yield number, "repeats the header. Remove the line, or rename the column"
            elif self.quoted and any(
                _ALL_SPACED.fullmatch(f) and f in "".join(raw) for f in fields
            ):
                yield number, "has a blank before a field in quotation marks. Remove the blank"
            else:
                yield number, dict(zip(self.columns, fields))

    def _problem(self, count: int) -> str:
        problem = f"has {count} field{'s' * (count != 1)}, but the header has {len(self.columns)}"
        if count < len(self.columns):
            return problem
        name = _NAMES[self.separator]
        remedy = f"Put fields with {name} in quotation marks" if self.quoted else "Remove the tab"
        return f"{problem}. {remedy}, or name every field in the header"


def _folded(fields: Iterable[str]) -> list[str]:
    return [field.strip().casefold() for field in fields]


def read_layout(file: Path, kind: str) -> TableLayout:
    """Return the layout of a file of the kind "csv" or "tsv"; an empty file has no columns.

    Raises UserError if the header cannot be read, or names a column twice.
    """
    with open_bytes(file) as stream:
        first = without_end(next(Lines(file, stream), ""))
    if looks_like_json(first):
        raise UserError(f"{file} holds JSON, and its name says {kind}. Name it .jsonl")
    said = _SEPARATOR_LINE.fullmatch(first)
    separators = said[1] if said is not None else _SEPARATORS[kind]
    is_quoted = kind == "csv" or _is_quoted(file)
    layouts = [(separator, is_quoted or separator != "\t") for separator in separators]
    separator, quoted = next(
        (found for found in layouts if _fits(file, *found)),
        next((found for found in layouts if len(_start(file, *found)[0]) > 1), layouts[0]),
    )
    spaced = quoted and _is_spaced(file, separator)
    with open_bytes(file) as stream:
        rows = _fields(Lines(file, stream), separator, quoted=quoted, spaced=spaced)
        header = next(rows, (0, [], []))[1]
    if any("\r" in name for name in header):
        raise UserError(
            f"{file} ends its lines with carriage returns alone. Save it with the line ends of "
            "Unix or Windows"
        )
    columns = [name.strip() or f"column {n}" for n, name in enumerate(header, start=1)]
    for name in columns:
        if columns.count(name) > 1:
            raise UserError(f"{file} names the column {name!r} twice. Rename or remove one of them")
    return TableLayout(file, tuple(columns), separator, quoted, spaced)


def _fits(file: Path, separator: str, quoted: bool) -> bool:
    """Return whether it separates several fields in the header, and as many in the first row."""
    return _is_even(_start(file, separator, quoted))


def _is_even(rows: list[list[str]]) -> bool:
    return len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows)


def _is_spaced(file: Path, separator: str) -> bool:
    """Return whether a blank is before a field in quotation marks in the header or the first row.

    The two rows must be readable without it.
    """
    bare, skipped = (_start(file, separator, True, spaced=spaced) for spaced in (False, True))
    has_mark = any(_SPACED.match(field) for row in bare for field in row)
    return has_mark and bare != skipped and _is_even(skipped)


def _start(file: Path, separator: str, quoted: bool, *, spaced: bool = False) -> list[list[str]]:
    """Return the header and the first row, or one empty header if they cannot be read so."""
    try:
        with open_bytes(file) as stream:
            rows = _fields(Lines(file, stream), separator, quoted=quoted, spaced=spaced)
            return [fields for _, fields, _ in itertools.islice(rows, 2)] or [[]]
    except UserError:
        return [[]]


def _fields(
    lines: Lines, separator: str, *, quoted: bool, spaced: bool
) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield (line, fields, lines as they are) for the header and each row.

    Blank lines and Excel's line "sep=;" are passed over, and rows without text before the header;
    without quotation marks a blank line after the header is a row with one empty field.
    """
    csv.field_size_limit(sys.maxsize)
    source = _Protected(lines)
    is_header = lines.offset == 0
    rows: Iterator[list[str]] = csv.reader(
        source, delimiter=separator, skipinitialspace=spaced, strict=True
    )
    if not quoted:
        rows = (without_end(line).split(separator) for line in source)
    while True:
        first = lines.number + 1
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(_quote_problem(f"{lines.file} line {first}", str(error))) from error
        is_blank = (quoted and not fields) or (is_header and not "".join(fields).strip())
        if not is_blank:
            is_header = False
            yield first, source.restored(fields), source.taken
        source.taken = []


class _Protected(Iterator[str]):
    """Lines in which a lone \\r is written in two other characters, until `restored`."""

    def __init__(self, lines: Lines) -> None:
        self._lines, self._is_escaped = lines, False
        self.taken: list[str] = []  # lines that were read since it was emptied

    def __next__(self) -> str:
        line = next(self._lines)
        if self._lines.number == 1 and _SEPARATOR_LINE.fullmatch(without_end(line)):
            line = next(self._lines)
        self.taken.append(line)
        body = without_end(line)
        if "\r" not in body and _ESCAPE not in body:
            return line
        self._is_escaped = True
        escaped = body.replace(_ESCAPE, f"{_ESCAPE}0").replace("\r", f"{_ESCAPE}1")
        return escaped + line[len(body) :]

    def restored(self, fields: list[str]) -> list[str]:
        """Return the fields as they are in the file."""
        if not self._is_escaped:
            return fields
        self._is_escaped = False
        return [
            field.replace(f"{_ESCAPE}1", "\r").replace(f"{_ESCAPE}0", _ESCAPE) for field in fields
        ]


def _quote_problem(where: str, problem: str) -> str:
    if "end of data" in problem:
        return f"{where} opens a quotation mark that is never closed. Close it"
    return f'{where} has a quotation mark within a field in quotation marks. Write it twice: ""'


def _is_quoted(file: Path) -> bool:
    """Return whether a TSV file is exactly what a program writes, with fields in quotes."""
    with open_bytes(file) as stream:
        if not any(line.startswith('"') or '\t"' in line for line in Lines(file, stream)):
            return False
    styles, doubles = [_by_need, _all, _as_excel, _as_r], False
    with open_bytes(file) as stream:
        taken: list[str] = []
        rows = csv.reader(_kept(Lines(file, stream), taken), delimiter="\t", strict=True)
        try:
            for fields in rows:
                text = without_end("".join(taken))
                taken.clear()
                styles = [write for write in styles if not text or write(fields) == text]
                doubles |= any('"' in field for field in fields)
                if not styles:
                    return False
        except csv.Error:
            return False
    return doubles or styles != [_as_excel]  # speech may have commas in it


def _kept(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _by_need(fields: list[str], quoting: Any = csv.QUOTE_MINIMAL) -> str:
    """Return the line that the csv module writes."""
    text = io.StringIO()
    csv.writer(text, delimiter="\t", quoting=quoting, lineterminator="\r\n").writerow(fields)
    return text.getvalue().removesuffix("\r\n")


def _all(fields: list[str]) -> str:
    return _by_need(fields, csv.QUOTE_ALL)


def _as_excel(fields: list[str]) -> str:
    """Return the line that Excel writes: also a field with a comma is in quotation marks."""
    return "\t".join(_quoted(field) if set('",\t\r\n') & set(field) else field for field in fields)


def _as_r(fields: list[str]) -> str:
    """Return the line that R writes: all but numbers is in quotation marks."""
    return "\t".join(field if _NUMBER.fullmatch(field) else _quoted(field) for field in fields)


def _quoted(field: str) -> str:
    return '"' + field.replace('"', '""') + '"'
