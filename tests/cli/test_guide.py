"""The guide is right: its data formats are read, and its training loop runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import finetune

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
SECTION = GUIDE.split("\n## Data formats\n")[1].split("\n## ")[0]
EXAMPLES = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", SECTION, flags=re.M | re.S))
FORMATS = {
    "`messages`": ("chat", 2),
    "ShareGPT `conversations`": ("chat", 1),
    "`prompt` and `completion`": ("chat", 1),
    "`instruction`, `input`, `output`": ("chat", 2),
    "`translation`": ("translation", 1),
    "Two language columns": ("translation", 2),
    "Two aligned text files": ("translation", 2),
    "`text`": ("text", 2),
}
MODEL = {
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "tokenizer": {"vocab_size": 300},
}


def test_every_format_has_an_example():
    assert EXAMPLES.keys() == FORMATS.keys()


@pytest.mark.parametrize("heading", FORMATS)
def test_an_example_is_read(heading, folder):
    example = EXAMPLES[heading]
    files = re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)^```", example, flags=re.M | re.S)
    assert files
    for name, text in files:
        (folder / name).write_text(text, encoding="utf-8")
    configs = re.findall(r"```yaml\n(.*?)```", example, flags=re.S)
    data = yaml.safe_load(configs[0])["data"] if configs else {"train": files[0][0]}
    config = {"model": MODEL, "data": {**data, "validation_fraction": 0.0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = finetune("inspect", "config.yaml")
    assert result.code == 0, result.err
    kind, count = FORMATS[heading]
    assert f"encoding the data as {kind}" in result.out + result.err
    assert len(re.findall(r"example \d+: ", result.out)) == count


def test_the_training_loop_runs(folder):
    (code,) = re.findall(
        r"```python\n(.*?)```", GUIDE.split("\n## A training loop of")[1], flags=re.S
    )
    records = [{"prompt": f"{n} plus 1?", "completion": f"It is {n + 1}."} for n in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")
    config = {"model": MODEL, "data": {"train": "data.jsonl"}, "training": {"max_steps": 8}}
    (folder / "my_run.yaml").write_text(yaml.safe_dump({**config, "optimizer": {"lr": 3e-3}}))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert {path.name for path in (folder / "model").iterdir()} >= {
        "model.safetensors",
        "tokenizer.json",
    }
