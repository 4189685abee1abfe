"""Local data files: which kind a name is, and what is wrong with a file that cannot be read."""

import csv
import glob
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from finetune.errors import UserError, did_you_mean

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
PACKAGE = "package:"


def local_files(path: str, *, is_text: bool = False) -> list[Path]:
    """Return the files that `path` names: a file, a glob, or package:NAME for the demo data.

    The result is empty for a folder or the name of a hub dataset. With `is_text`, files of any
    ending are text. Raises UserError for a local name without a file, or for an empty file.
    """
    if path.startswith(PACKAGE):
        return [_package_file(path)]
    if glob.has_magic(path):
        found = sorted(
            Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file()
        )
        if not found:
            raise UserError(f"no file matches {path!r} (looked in {Path.cwd()})")
    elif Path(path).expanduser().is_file():
        found = [Path(path).expanduser()]
    elif Path(path).expanduser().is_dir():
        return []
    elif Path(path).suffix in KINDS or path.startswith((".", "/", "~")):
        raise UserError(f"there is no file or folder {path!r} (looked in {Path.cwd()})")
    else:
        return []
    for file in found:
        if not is_text:
            kind_of(file)
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty")
    return found


def kind_of(file: Path) -> str:
    """Return the kind of a data file by its ending."""
    if file.suffix not in KINDS:
        raise UserError(
            f"{file} has the unknown ending {file.suffix!r}; known are {', '.join(KINDS)}"
        )
    return KINDS[file.suffix]


def _package_file(path: str) -> Path:
    folder = files("finetune") / "resources" / "data"
    names = sorted(
        entry.name.removesuffix(".jsonl")
        for entry in folder.iterdir()
        if entry.name.endswith(".jsonl")
    )
    name = path.removeprefix(PACKAGE)
    if name not in names:
        raise UserError(
            f"the package has no data {name!r}; it has {', '.join(names)}"
            f"{did_you_mean(name, names)}"
        )
    return Path(str(folder / f"{name}.jsonl"))


def read_lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file without their line breaks.

    Only \\n and \\r\\n end a line, as `wc -l` counts.
    """
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error


def table_options(file: Path, kind: str) -> dict[str, Any]:
    """Return how a CSV or TSV file is to be read, with the names of its `columns`.

    For other kinds the result is empty. TSV has no quotes: a quotation mark is plain text, and each
    line is a row.
    """
    if kind not in ("csv", "tsv"):
        return {}
    options: dict[str, Any] = (
        {"sep": ","} if kind == "csv" else {"sep": "\t", "quoting": csv.QUOTE_NONE}
    )
    quoting = options.get("quoting", csv.QUOTE_MINIMAL)
    header = next(csv.reader(read_lines(file), delimiter=options["sep"], quoting=quoting), [])
    columns = [name.removeprefix("\ufeff") for name in header]
    return {**options, "columns": columns, "keep_default_na": False}


def check_json(file: Path) -> None:
    """Raise UserError if a JSON file is broken: neither one object a line nor a list of objects."""
    first_error: UserError | None = None
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            if isinstance(json.loads(line), dict):
                continue
            first_error = UserError(
                f"{file} line {number} must be a JSON object, such as {{...}}, not {line[:60]!r}"
            )
        except json.JSONDecodeError as error:
            first_error = UserError(f"{file} line {number} is broken JSON: {_problem(error)}")
        break
    if first_error is not None and file.suffix == ".json":
        _check_json_list(file)
    elif first_error is not None:
        raise first_error


def _check_json_list(file: Path) -> None:
    try:
        value = json.loads("\n".join(read_lines(file)))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno} is broken JSON: {_problem(error)}") from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{file} must hold a list of JSON objects, or one object a line")


def _problem(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' starting at').lower()} at column {error.colno}"
