"""lm-evaluation-harness takes a run's model as it is, with the guide's own task.

It brings twenty packages, so it is in no extra and no environment of the project: install `lm_eval`
into an environment of its own, and run this file there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import train_in
from tests.conftest import conversation

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed here")
pytestmark = pytest.mark.slow


def test_the_guides_task_is_evaluated(tmp_path):
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(24))
    )
    train_in(tmp_path, data={"train": "chat.jsonl", "max_length": 96})
    task = re.search(r"```yaml\n(task: sums\n.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(task[1], encoding="utf-8")
    lines = [{"prompt": f"What is {n} plus 1?", "completion": f"It is {n + 1}."} for n in range(6)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = tmp_path / "run" / "model"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf"),
            *("--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"),
            *("--include_path", "tasks", "--tasks", "sums", "--output_path", "out"),
        ],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(found.read_text(encoding="utf-8"))
    assert 0 <= results["results"]["sums"]["acc,none"] <= 1
    assert results["n-samples"]["sums"]["effective"] == 6
