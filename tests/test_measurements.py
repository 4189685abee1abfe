"""docs/measurements.md is what docs/measurements.jsonl says, and the README quotes it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "measurements.py"
LINES = (ROOT / "docs" / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
RECORDS = [json.loads(line) for line in LINES]
TABLES = [record for record in RECORDS if "table" in record]
FIGURES = [record for record in RECORDS if "table" not in record]


def run(*arguments: str, script: Path = SCRIPT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_document_is_what_the_figures_say():
    done = run("--check")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def copy(tmp_path) -> Path:
    """The script and its document in a folder that may be written to."""
    for name in ("scripts/measurements.py", "docs/measurements.md", "docs/measurements.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def test_a_changed_figure_is_noticed_and_written(copy):
    figures, document = (copy / "docs" / f"measurements.{ending}" for ending in ("jsonl", "md"))
    figures.write_text(figures.read_text("utf-8").replace('"1.752"', '"1.999"'), "utf-8")
    before = document.read_bytes()
    done = run("--check", script=copy / "scripts" / "measurements.py")
    assert done.returncode == 1
    assert "python scripts/measurements.py" in done.stderr
    assert document.read_bytes() == before
    assert run(script=copy / "scripts" / "measurements.py").returncode == 0
    assert "1.999 nats" in document.read_text("utf-8")
    assert "1.752 nats" not in document.read_text("utf-8")


def test_a_cell_holds_one_figure():
    assert len(TABLES) > 20
    assert len(FIGURES) > 300
    places = set()
    table = {}
    for record in RECORDS:
        if "table" in record:
            table = record
            assert re.fullmatch(r"2\d{3}-\d\d-\d\d", table["date"])
            continue
        assert record["column"] in table["columns"]
        assert re.fullmatch(r"[\d,]*\.?\d+k?|\d+ min \d+ s|`.+`", record["value"]), record
        place = (table["machine"], table["table"], record["row"], record["column"])
        assert place not in places, place
        places.add(place)


def test_the_figures_of_the_readme_are_among_them():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Measured\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    quoted = [figure for cells in rows[2:] for cell in cells[1:] for figure in cell.split(" / ")]
    assert len(quoted) == 4 * 9
    assert {figure.strip() for figure in quoted} <= {figure["value"] for figure in FIGURES}
    ratios = re.findall(r"[\d.]+ ×", section)
    assert len(ratios) >= 2
    assert {*ratios} <= {f"{figure['value']} {figure['unit']}" for figure in FIGURES}
