"""`import finetune` is instant and says what there is."""

import subprocess
import sys

import finetune


def test_every_public_name_is_there():
    assert len(finetune.__all__) == 10
    for name in finetune.__all__:
        assert getattr(finetune, name).__module__.startswith("finetune."), name
    assert set(finetune.__all__) == set(finetune._HOMES) <= set(dir(finetune))


def test_importing_does_not_load_torch():
    code = "import sys, finetune, finetune.cli; print(sorted({'torch', 'transformers', 'datasets', 'pydantic'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
