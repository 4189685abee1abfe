"""The scripts behind docs/claims.md: the quick ones run, and the document is up to date.

What is mathematically certain comes out. Whether a noisy claim reproduces is not asserted:
docs/claims.md reports it.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "reproduce"
QUICK = ["momentum", "bias_correction", "sparse_words", "heavy_tail", "decoupled_decay"]
SLOW = ["mri_unet", "smollm2"]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def quick() -> dict[str, dict]:
    """What the quick half found, by script."""
    kept = [(ROOT / "docs" / name).read_bytes() for name in ("claims.md", "claims.jsonl")]
    done = run(str(FOLDER / "all.py"), "--quick")
    assert done.returncode == 0, done.stderr
    now = [(ROOT / "docs" / name).read_bytes() for name in ("claims.md", "claims.jsonl")]
    assert now == kept  # a quick run writes nothing
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.stdout.count("verdict: ") == len(records) == len(QUICK)
    return dict(zip(QUICK, records))


def test_every_script_is_known_here():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"claim", "all"}
    assert scripts == {*QUICK, *SLOW}
    assert all(path.read_text(encoding="utf-8").count("\n") <= 150 for path in FOLDER.glob("*.py"))


@pytest.mark.slow
def test_every_verdict_rests_on_finite_figures(quick):
    for name, record in quick.items():
        assert record["verdict"] in ("reproduced", "reproduced in part", "not reproduced"), name
        assert len(record["checks"]) >= 3
        assert all(math.isfinite(value) for value in record["checks"].values()), name
        assert all(len(row) == len(record["columns"]) for row in record["rows"]), name
        assert record["url"].startswith("https://")


@pytest.mark.slow
def test_momentum_takes_the_square_root(quick):
    checks = quick["momentum"]["checks"]
    assert quick["momentum"]["verdict"] == "reproduced"
    assert checks["exponent_sgd"] == pytest.approx(1, abs=0.02)
    assert checks["exponent_momentum"] == pytest.approx(0.5, abs=0.06)
    assert checks["exponent_nesterov"] == pytest.approx(0.5, abs=0.06)


@pytest.mark.slow
def test_the_first_step_without_bias_correction(quick):
    rows = {row[0]: row[1] for row in quick["bias_correction"]["rows"]}
    assert quick["bias_correction"]["checks"]["exact"] == 1
    for beta2 in (0.99, 0.999, 0.9999):
        assert rows[f"β2 = {beta2}, corrected"] == "1.00"
        assert float(rows[f"β2 = {beta2}, uncorrected"]) == pytest.approx(
            0.1 / math.sqrt(1 - beta2), abs=0.005
        )


@pytest.mark.slow
def test_the_comparison_of_language_models_runs_on_a_tiny_one(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import claim, smollm2\n"
        "configs = {'translation': 'tiny_translation'}\n"
        "claim.present(smollm2.reproduce(True, configs=configs, optimizers='sgd,adamw'))"
    )
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [row[0] for row in record["rows"]] == ["sgd", "adamw"]
    assert record["checks"].keys() == {"translation_sgd", "translation_adamw"}
    assert (tmp_path / "runs" / "reproduce-tiny_translation-2" / "comparison.html").is_file()


def test_the_document_is_what_the_figures_say():
    code = "import all; print(all.document(all.read(all.DOCS / 'claims.jsonl')), end='')"
    done = run("-c", code, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert done.stdout == text
    for name in (*QUICK, *SLOW):
        commands = (f"{name}.py", f"all.py {name}")
        assert any(f"python scripts/reproduce/{command}" in text for command in commands)
    for line in (ROOT / "docs" / "claims.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["script"] in (*QUICK, *SLOW)


def test_a_wrong_name_is_refused():
    done = run(str(FOLDER / "all.py"), "momentun")
    assert done.returncode == 2
    assert "there is no momentun" in done.stderr
