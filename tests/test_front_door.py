"""`import finetune` is instant, and every public name can be had from it."""

import subprocess
import sys

import finetune


def test_every_public_name_is_there():
    assert len(finetune.__all__) == 13
    for name in finetune.__all__:
        assert getattr(finetune, name).__module__.startswith("finetune."), name
    assert set(finetune.__all__) == set(finetune._HOMES) <= set(dir(finetune))


def test_importing_does_not_load_torch():
    code = (
        "import sys, finetune, finetune.cli\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_api_is_there_before_torch():
    code = (
        "import sys\nfrom finetune import train, load, UserError\n"
        "try:\n    train(model='./none', data='none.jsonl')\nexcept UserError: print('said')\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "said\n[]\n"
