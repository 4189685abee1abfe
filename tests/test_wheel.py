"""The wheel has everything in it and works where there is no repository. Nothing is downloaded."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import LLAMA

ROOT = Path(__file__).parents[1]
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")


def run(*command: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the repository stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "finetune", source / "finetune", ignore=shutil.ignore_patterns("__pycache__")
    )
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        "dist",
        ".",
        cwd=source,
    )
    (found,) = (source / "dist").iterdir()
    return found


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "finetune").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    endings = {Path(name).suffix for name in files}
    assert {".py", ".yaml", ".jsonl", ".jinja", ".css", ".typed"} <= endings
    assert files - inside == set()
    extra = {name for name in inside - files if ".dist-info/" not in name}
    assert extra == set()
    for name in ("licenses/LICENSE", "licenses/NOTICE", "entry_points.txt"):
        assert any(entry.endswith(f".dist-info/{name}") for entry in inside), name


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python, program = home / "bin" / "python", home / "bin" / "finetune"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        wheel,
        cwd=tmp_path,
    )
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # the libraries of the tests, but not its finetune
    where = run(python, "-c", "import finetune; print(finetune.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(home)
    assert "translate" in run(program, "--help", cwd=tmp_path)
    assert "--short" in run(program, "demo", "--help", cwd=tmp_path)
    tree = {
        "output_dir": "run",
        "model": {"config": LLAMA, "tokenizer": {"vocab_size": 300}},
        "data": {
            "train": {"path": "package:chat.en.train", "max_records": 16},
            "validation": {"path": "package:chat.en.test", "max_records": 4},
            "max_length": 96,
        },
        "training": {"max_steps": 2, "batch_size": 4},
        "evaluation": {"samples": 1},
        "generation": {"max_new_tokens": 4},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    run(program, "train", "c.yaml", cwd=tmp_path)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "<style" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    versions = json.loads((tmp_path / "run" / "environment.json").read_text())["versions"]
    assert versions["finetune-rows"] in wheel.name
