"""Trackio gets a run's numbers. `make test-trackio` installs it beside the environment.

It wants an older pillow than the other libraries here, so it is in no extra.
"""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytest.importorskip("trackio", reason="`make test-trackio` installs it")


def test_trackio_gets_the_numbers(tiny, tmp_path):
    tree = {**tiny(training={"max_steps": 3}), "tracking": ["trackio"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    places = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "train", "c.yaml"],
        cwd=tmp_path, env={**os.environ, **places}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (database,) = (tmp_path / "trackio").rglob("run.db")
    with sqlite3.connect(database) as found:
        (count,) = found.execute("select count(*) from metrics").fetchone()
    assert count >= 3
