"""The tables of docs/measurements.md, written from the figures in docs/measurements.jsonl.

    python scripts/measurements.py            write the tables
    python scripts/measurements.py --check    write nothing; exit with 1 if the document differs

A line of the JSONL file is a table or a figure of the table above it:

    {"machine": ..., "table": TITLE, "columns": [...], "date": ...}
    {"row": ..., "column": ..., "value": "644", "unit": "tokens/s"}

A table may also have a `setting`, a `command` and a `note`; a figure may have a `range`. Values are
strings, so that "2.850" keeps its digits. The tables of a machine go between its markers in the
document: `<!-- MACHINE -->` and `<!-- end -->`.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
SECTION = re.compile(r"(<!-- (?P<machine>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def read_tables(path: Path) -> list[dict[str, Any]]:
    """Return the tables in order, each with its list of `figures`."""
    tables: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "table" in record:
            tables.append({**record, "figures": []})
        else:
            tables[-1]["figures"].append(record)
    return tables


def cell(figure: dict[str, str] | None) -> str:
    """Return a value and its unit, or nothing."""
    return f"{figure['value']} {figure['unit']}".strip() if figure else ""


def line(cells: list[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def render(table: dict[str, Any]) -> str:
    """Return a table with its title, its setting, its command and its note as Markdown."""
    figures = {(figure["row"], figure["column"]): figure for figure in table["figures"]}
    rows = list(dict.fromkeys(row for row, _ in figures))
    columns = table["columns"]
    ranged = {figure["column"] for figure in table["figures"] if "range" in figure}
    heads = [name for column in columns for name in [column, *["range"] * (column in ranged)]]
    lines = [line(["", *heads]), line(["---", *["---:" for _ in heads]])]
    for row in rows:
        cells = [row]
        for column in columns:
            figure = figures.get((row, column))
            cells.append(cell(figure))
            if column in ranged:
                cells.append(figure.get("range", "") if figure else "")
        lines.append(line(cells))
    parts = [
        f"### {table['table']}",
        f"Measured on {table['date']}. {table.get('setting', '')}".strip(),
        f"Command: `{table['command']}`." if "command" in table else "",
        "\n".join(lines),
        table.get("note", ""),
    ]
    return "\n\n".join(part for part in parts if part)


def document(text: str, tables: list[dict[str, Any]]) -> str:
    """Return `text` with the tables of each machine between that machine's markers.

    Raises SystemExit if a machine has tables and no markers, or markers and no tables.
    """
    machines = [section["machine"] for section in SECTION.finditer(text)]
    if set(machines) != {table["machine"] for table in tables}:
        raise SystemExit("the machines of the document are not those of the figures")

    def fill(section: re.Match[str]) -> str:
        of_machine = [render(table) for table in tables if table["machine"] == section["machine"]]
        return section[1] + "\n" + "\n\n".join(of_machine) + "\n\n" + section[3]

    return SECTION.sub(fill, text)


def main() -> None:
    """Write the document, or compare it with the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit with 1 if it differs"
    )
    given = parser.parse_args()
    path = DOCS / "measurements.md"
    kept = path.read_text(encoding="utf-8")
    written = document(kept, read_tables(DOCS / "measurements.jsonl"))
    if given.check and written != kept:
        raise SystemExit(f"{path.name} differs: run `python scripts/measurements.py`")
    if not given.check:
        path.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
