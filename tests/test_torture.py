"""A minute of the campaign that `make torture` runs: nothing is lost, nothing is executed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_short_campaign(tmp_path):
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.torture", "--variants", "dense,lazy"),
            *("--kills", "6", "--faults", "4", "--bad-inputs", "28", "--seed", "7"),
            *("--folder", str(tmp_path / "t")),
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    last = ended.stdout.splitlines()[-1]
    found = re.match(
        r"seed 7: (\d+) kills in \d+ chains, 0 lost; 4 faults, 0 not as they should be; "
        r"28 bad inputs: (\d+) a sentence, (\d+) accepted as they may be, 0 tracebacks, "
        r"0 executed, 0 other",
        last,
    )
    assert found, ended.stdout
    assert int(found[1]) >= 6
    assert int(found[2]) + int(found[3]) == 28
    assert int(found[2]) > 10
