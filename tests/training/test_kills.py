"""A run that is killed at any file operation is resumed to the same bytes (see `kills`)."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.mark.slow
def test_a_kill_at_any_file_operation_loses_nothing():
    memory = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        ended = subprocess.run(
            [sys.executable, "-m", "tests.training.kills", folder],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": f"{folder}/cache"},
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [scenario["points"] for scenario in found] == [94, 91]
    assert [scenario["wrong"] for scenario in found] == [[], []]
