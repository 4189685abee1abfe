"""Every mistake a user can make is answered by one sentence on stderr and exit code 2, and costs nothing that was there."""
# ruff: noqa: E501  (the cases are a table: one a line)

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.cli.conftest import Result, finetune, snapshot
from tests.conftest import LLAMA, conversation

GOOD = json.dumps(conversation(3))
LINES = (
    "config missing or unreadable",
    "unknown key",
    "wrong type",
    "model not found",
    "dataset not found",
    "missing column",
    "empty file",
    "broken JSON",
    "no assistant turn",
    "roles out of order",
    "pair with an empty side",
    "text over the limit",
    "label outside the vocabulary",
    "template that fails",
    "out of disk",
    "another run in the folder",
    "changed model or data",
    "unknown optimizer or option",
    "nothing to evaluate on",
    "no run and no model",
    "zero target tokens",
    "settings that contradict each other",
    "usage",
)


@dataclass(frozen=True)
class Case:
    """`finetune COMMAND` in a folder with `files` and c.yaml, the tiny config with `config` changed, says all of `says`."""

    line: str
    says: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ("train", "c.yaml")
    files: Mapping[str, str | bytes] = field(default_factory=dict)


def rows(*bad: Any, good: int = 2) -> str:
    """Lines of JSON: so many good conversations, then these."""
    return (
        "\n".join([GOOD] * good + [row if isinstance(row, str) else json.dumps(row) for row in bad])
        + "\n"
    )


def turns(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def data(path: str, **more: Any) -> dict[str, Any]:
    return {"data": {"train": path, "validation_fraction": 0.0, **more}}


def bad_rows(line: str, says: tuple[str, ...], content: str, **more: Any) -> Case:
    return Case(line, ("bad.jsonl", *says), data("bad.jsonl", **more), files={"bad.jsonl": content})


def override(line: str, change: str, *says: str) -> Case:
    return Case(line, says, command=("train", "c.yaml", change))


PAIRS = "".join(
    json.dumps({"translation": {"en": f"word {n}", "fr": f"mot {n}"}}) + "\n" for n in range(4)
)
CASES = {
    # --- the config
    "config missing": Case("config missing or unreadable", ("none.yaml does not exist", "looked in"), command=("train", "none.yaml")),
    "config is a folder": Case("config missing or unreadable", ("is a folder", "YAML file"), command=("train", "."), files={"a": ""}),
    "config is not text": Case("config missing or unreadable", ("x.yaml is not UTF-8",), command=("inspect", "x.yaml"), files={"x.yaml": b"\xff\xfe"}),
    "config is broken": Case("config missing or unreadable", ("not valid YAML", "line 2"), command=("inspect", "x.yaml"), files={"x.yaml": "a: 1\nb: ["}),
    "list as a key": Case("config missing or unreadable", ("not valid YAML", "a list or a mapping cannot be a key at line 2"), command=("train", "x.yaml"), files={"x.yaml": "a: 1\n[b, c]: 2\n"}),
    "mapping as a key": Case("config missing or unreadable", ("not valid YAML", "cannot be a key"), command=("train", "x.yaml"), files={"x.yaml": "{b: c}: 2\n"}),
    "config is a list": Case("config missing or unreadable", ("mapping", "a list"), command=("train", "x.yaml"), files={"x.yaml": "- 1"}),
    "config is empty": Case("config missing or unreadable", ("mapping", "nothing"), command=("train", "x.yaml"), files={"x.yaml": ""}),
    "unknown section": Case("unknown key", ("'trainig' is not a key", "did you mean 'training'", "optimizer"), {"trainig": {"epochs": 1}}),
    "unknown key": Case("unknown key", ("'epohs' is not a key", "did you mean 'epochs'", "max_steps"), {"training": {"epohs": 1}}),
    "unknown key of a source": Case("unknown key", ("did you mean 'weight'",), {"data": {"train": [{"path": "a", "wieght": 1}]}}),
    "unknown override": override("unknown key", "generation.topp=0.9", "'generation.topp' is not a key", "did you mean 'top_p'"),
    "key of Hugging Face without an equal": override("unknown key", "gradient_accumulation_steps=2", "training.micro_batch_size"),
    "former key": Case("unknown key", ("data: 'max_validation_rows' is not a key here", "write data.max_validation_records"), {"data": {"max_validation_rows": 3}}),
    "former key of a source": Case("unknown key", ("'data.train.0.max_rows' is not a key here", "write max_records"), {"data": {"train": [{"path": "a", "max_rows": 1}]}}),
    "former key as an override": override("unknown key", "data.max_validation_rows=3", "'max_validation_rows' is not a key here", "write data.max_validation_records"),
    "override without a value": override("unknown key", "training.epochs", "key=value"),
    "text for a number": override("wrong type", "training.epochs=many", "training.epochs = 'many'", "number"),
    "half a sequence": override("wrong type", "training.micro_batch_size=1.5", "training.micro_batch_size = 1.5", "integer"),
    "negative": override("wrong type", "optimizer.lr=-1", "optimizer.lr = -1", "greater than 0"),
    "not a choice": override("wrong type", "training.precision=int3", "'auto', 'fp32', 'bf16' or 'fp16'"),
    "number for a source": override("wrong type", "data.train=3", "data.train.0 = 3", "a mapping of keys to values"),
    "no source": override("wrong type", "data.train=[]", "data.train is an empty list", "name a file"),
    "no held-out source": override("wrong type", "data.validation=[]", "data.validation is an empty list", "leave the key out"),
    "text for a section": override("wrong type", "model=gpt2", "model = 'gpt2'", "a mapping of keys to values"),
    "text for an optimizer option": override("wrong type", "optimizer.betas=high", "betas"),
    # --- the model
    "no such hub model": override("model not found", "model={name: no-such-org/no-such-model}", "no-such-org/no-such-model", "folder here", "hub"),
    "no such model folder": override("model not found", "model={name: ./none}", "model folder ./none does not exist", "looked in"),
    "no such gguf": override("model not found", "model={name: none.gguf}", "none.gguf does not exist", "looked in"),
    "no such package": override("model not found", "model={name: 'package:none'}", "not installed", "pip install"),
    "folder without a model": Case("model not found", ("is not a model", "config.json"), command=("train", "c.yaml", "model={name: here}"), files={"here/a.txt": ""}),
    "unknown architecture": override("model not found", "model.config.model_type=lama", "'lama'", "did you mean 'llama'"),
    "unknown key of the architecture": override("model not found", "model.config.hiden_size=3", "'hiden_size'", "did you mean 'hidden_size'"),
    "type of model that is no text": override("model not found", "model.config.model_type=[llama]", "['llama']", "e.g. llama"),
    "unknown activation": override("wrong type", "model.config.hidden_act=silu2", "'silu2' is not known", "change model.config.hidden_act"),
    "no heads": override("wrong type", "model.config.num_attention_heads=0", "model.config.num_attention_heads is 0", "1 or more"),
    "no heads, in GPT-2's words": override("wrong type", "model.config={model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 0}", "model.config.n_head is 0", "1 or more"),
    "heads that do not divide": Case("wrong type", ("num_attention_heads is 4", "num_key_value_heads = 3"), command=("train", "c.yaml", "model.config.num_attention_heads=4", "model.config.num_key_value_heads=3")),
    "size below nothing": override("wrong type", "model.config.intermediate_size=-4", "no llama model can be made", "negative"),
    "evaluate nothing": Case("model not found", ("no-such-model", "hub"), command=("evaluate", "no-such-model")),
    "generate from nothing": Case("model not found", ("folder ./none",), command=("generate", "./none", "--prompt", "a")),
    "chat with nothing": Case("model not found", ("folder ./none",), command=("chat", "./none")),
    # --- the data
    "no such hub dataset": override("dataset not found", "data.train=no-such-org/no-such-data", "no-such-org/no-such-data", "looked in", "hub"),
    "no such file": override("dataset not found", "data.train=none.jsonl", "'none.jsonl'", "looked in"),
    "no such glob": override("dataset not found", "data.train='none*.jsonl'", "no file matches 'none*.jsonl'", "looked in"),
    "no such demo data": override("dataset not found", "data.train='package:chat.en.trian'", "'chat.en.trian'", "did you mean 'chat.en.train'"),
    "folder without data": Case("dataset not found", ("here",), data("here"), files={"here/readme": "x"}),
    "unknown ending": Case("dataset not found", ("'.xml'", ".jsonl"), data("a.xml"), files={"a.xml": "x"}),
    "no such split": override("dataset not found", "data.train=[{path: chat.jsonl, split: tset}]", "unknown split", "train"),
    "no such validation file": override("dataset not found", "data.validation=none.csv", "'none.csv'", "looked in"),
    "no known column": Case("missing column", ("question, answer", "messages", "data.columns"), data("a.jsonl"), files={"a.jsonl": '{"question": "a", "answer": "b"}\n'}),
    "column of a format": Case("missing column", ("format 'translation'", "messages"), {"data": {"format": "translation"}}),
    "named column": override("missing column", "data.columns={prompt: question}", "'question'", "the columns are messages"),
    "unknown name in columns": override("missing column", "data.columns={promt: messages}", "'promt'", "did you mean 'prompt'"),
    "a language that is not there": Case("missing column", ("'de'", "en, fr"), data("a.jsonl", translation={"target_language": "de"}), files={"a.jsonl": PAIRS}),
    "no bytes": Case("empty file", ("a.jsonl is empty",), data("a.jsonl"), files={"a.jsonl": ""}),
    "blank lines": Case("empty file", ("a.jsonl is empty",), data("a.jsonl"), files={"a.jsonl": "\n\n"}),
    "empty list": Case("empty file", ("a.json is empty",), data("a.json"), files={"a.json": "[]"}),
    "header alone": Case("empty file", ("a.csv is empty",), data("a.csv"), files={"a.csv": "en,fr\n"}),
    "empty stream": Case("empty file", ("a.jsonl is empty",), {**data("a.jsonl", streaming=True)}, files={"a.jsonl": "\n"}),
    "broken line": bad_rows("broken JSON", ("line 3 is broken JSON", "column"), rows('{"messages": [}')),
    "cut line": bad_rows("broken JSON", ("line 3 is broken JSON",), rows(GOOD[:-5])),
    "line that is no object": bad_rows("broken JSON", ("line 3 must be a JSON object",), rows([1, 2])),
    "broken list": Case("broken JSON", ("line 2 is broken JSON",), data("a.json"), files={"a.json": f"[{GOOD},\n oops]"}),
    "broken line in a stream": bad_rows("broken JSON", ("line 3 is broken JSON",), rows('{"messages": [}'), streaming=True),
    "question alone": bad_rows("no assistant turn", ("line 3", "no assistant turn"), rows(turns(("user", "Hello?")))),
    "no messages": bad_rows("no assistant turn", ("line 3", "no assistant turn"), rows({"messages": []})),
    "two questions": bad_rows("roles out of order", ("line 3", "message 2 is from user after user", "must be from assistant"), rows(turns(("user", "a"), ("user", "b"), ("assistant", "c")))),
    "answer first": bad_rows("roles out of order", ("line 3", "message 1 is from assistant at the start", "must be from user"), rows(turns(("assistant", "c"), ("user", "b")))),
    "late system": bad_rows("roles out of order", ("line 3", "message 3 is from system"), rows(turns(("user", "a"), ("assistant", "b"), ("system", "c")))),
    "unknown role": bad_rows("roles out of order", ("line 3", "'robot'", "assistant"), rows(turns(("user", "a"), ("robot", "b")))),
    "empty message": bad_rows("roles out of order", ("line 3", "message 2 (assistant) is empty"), rows(turns(("user", "a"), ("assistant", " ")))),
    "empty target": Case("pair with an empty side", ("line 5", "empty side", "'fr'"), data("a.jsonl"), files={"a.jsonl": PAIRS + '{"translation": {"en": "a", "fr": " "}}\n'}),
    "empty cell": Case("pair with an empty side", ("line 3", "empty side", "'en'"), data("a.csv"), files={"a.csv": "en,fr\na,b\n,c\n"}),
    "unequal files": Case("pair with an empty side", ("a.txt", "2 lines", "b.txt", "3"), data([{"path": "a.txt", "target_path": "b.txt"}]), files={"a.txt": "x\ny\n", "b.txt": "x\ny\nz\n"}),
    "long record": Case("text over the limit", ("line 1", "tokens", "data.max_length = 12", "truncate or drop"), {"data": {"max_length": 12, "overlong": "error"}}),
    **{f"longer than the model reads, {command}": Case("text over the limit", ("data.max_length is 129", "at most 128", "set data.max_length=128"), {"data": {"max_length": 129}}, command=command_line) for command, command_line in {"train": ("train", "c.yaml"), "inspect": ("inspect", "c.yaml"), "plan": ("plan", "c.yaml"), "evaluate": ("evaluate", "model", "--config", "c.yaml")}.items()},
    "longer than GPT-2 reads": Case("text over the limit", ("data.max_length is 65", "at most 64"), {"model": {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}}, "data": {"max_length": 65}}),
    "all cut": Case("zero target tokens", ("no target tokens in 48 records", "48 without a target", "Raise data.max_length"), {"data": {"max_length": 4, "validation_fraction": 0.0}}),
    "all dropped": Case("zero target tokens", ("no target tokens in 48 records", "48 over data.max_length = 4 and dropped"), {"data": {"max_length": 4, "overlong": "drop", "validation_fraction": 0.0}}),
    "blank text": Case("zero target tokens", ("no target tokens in 1 record,", "1 blank"), data("a.jsonl"), files={"a.jsonl": '{"text": " "}\n'}),
    # --- templates
    "template that raises": Case("template that fails", ("chat template fails", "no numbers"), {"model": {"chat_template": "t.jinja"}}, files={"t.jinja": "{{ raise_exception('no numbers') }}"}),
    "template with a syntax error": Case("template that fails", ("chat template fails",), {"model": {"chat_template": "t.jinja"}}, files={"t.jinja": "{% for m in %}"}),
    **{f"template with {name}": Case("template that fails", ("chat template fails", says), {"model": {"chat_template": "t.jinja"}}, files={"t.jinja": template}) for name, says, template in (("a number after text", "str", "{% for m in messages %}{{ 'a' + loop.index }}{% endfor %}"), ("a number after a message", "str", "{{ messages[0].content + 1 }}"), ("a division by zero", "zero", "{{ 1/0 }}"))},
    "template that fails on one row": Case("template that fails", ("line 8", "chat template fails", "seven"), {"model": {"chat_template": "t.jinja"}, **data("chat.jsonl")}, files={"t.jinja": "{% for m in messages %}{% if ' 7 ' in m.content %}{{ raise_exception('seven') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"}),
    "template without an end mark": Case("template that fails", ("not a special token", "chatml"), {"model": {"chat_template": "t.jinja"}}, files={"t.jinja": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"}),
    "no such template": Case("template that fails", ("'none.jinja'", "chatml"), {"model": {"chat_template": "none.jinja"}}),
    "translation template without the source": Case("template that fails", ("{source}",), data("a.jsonl", translation={"template": "Translate!"}), files={"a.jsonl": PAIRS}),
    "translation template with an unknown field": Case("template that fails", ("{text}", "{source}"), data("a.jsonl", translation={"template": "{text} {source}"}), files={"a.jsonl": PAIRS}),
    # --- settings
    "unknown optimizer": override("unknown optimizer or option", "optimizer.name=adamv", "'adamv'", "did you mean 'adam", "lazy_adamw"),
    "unknown option": override("unknown optimizer or option", "optimizer.momentun=0.9", "momentun", "lazy_adamw", "betas"),
    "beta left out": override("unknown optimizer or option", "optimizer.betas=[0.9]", "betas is [0.9]", "give 2 numbers"),
    "beta too many": override("unknown optimizer or option", "optimizer.betas=[0.9, 0.99, 0.9]", "give 2 numbers"),
    "eps in words": override("unknown optimizer or option", "optimizer.eps=small", "eps is 'small'", "give a number"),
    "modules in a config": override("unknown optimizer or option", "optimizer.embeddings=[embed]", "embeddings", "Leave it out"),
    "optimizer of sparse gradients": override("unknown optimizer or option", "optimizer.name=sparse_adam", "'sparse_adam'", "choose lazy_adamw"),
    "pattern without a parameter": override("unknown optimizer or option", "optimizer.overrides=[{pattern: 'nothing.*', lr: 1e-5}]", "nothing.*"),
    "unknown schedule": override("unknown optimizer or option", "scheduler.name=step", "scheduler.name = 'step'", "'linear'"),
    "pattern of no optimizer": Case("unknown optimizer or option", ("'zzz*'",), command=("optimizers", "zzz*")),
    "best without its metric": Case("settings that contradict each other", ("evaluation.best is chrf", "evaluation.metrics=[chrf]"), {"evaluation": {"best": "chrf", "generate": 4}}),
    "best of what is not generated": Case("settings that contradict each other", ("evaluation.best is chrf", "evaluation.generate is 0"), data("a.jsonl", validation_fraction=0.5) | {"evaluation": {"best": "chrf", "generate": 0}}, files={"a.jsonl": PAIRS}),
    "patience without held-out data": Case("settings that contradict each other", ("held-out",), {"data": {"validation_fraction": 0.0}, "evaluation": {"early_stopping_patience": 2}}),
    "stream without an end": Case("settings that contradict each other", ("training.max_steps",), {"data": {"streaming": True, "validation_fraction": 0.0}, "training": {"max_steps": None}}),
    "stream to be split": override("settings that contradict each other", "data.streaming=true", "cannot be split", "data.validation"),
    "one record to be split": Case("settings that contradict each other", ("only one record", "data.validation"), {"data": {"train": "a.jsonl"}}, files={"a.jsonl": GOOD + "\n"}),
    "weight for one of two": override("settings that contradict each other", "data.train=[{path: chat.jsonl, weight: 1}, chat.jsonl]", "every source a weight"),
    "tokenizer for a pretrained model": override("settings that contradict each other", "model={name: ./none, tokenizer: {vocab_size: 300}}", "model.tokenizer"),
    "name and config": override("settings that contradict each other", "model.name=gpt2", "either model.name", "or model.config"),
    "vocabulary too small": override("settings that contradict each other", "model.tokenizer.vocab_size=100", "model.tokenizer.vocab_size", "at least"),
    "unknown tracker": override("settings that contradict each other", "tracking=[tensorbord]", "tensorbord", "tensorboard"),
    "tracker not installed": override("settings that contradict each other", "tracking=[comet_ml]", "comet_ml", "pip install comet-ml"),
    "unknown lora target": override("settings that contradict each other", "model.lora={target_modules: [nothing]}", "nothing"),
    # --- commands on what is no run
    "evaluate a model without data": Case("nothing to evaluate on", ("is a model, not a run", "--config"), command=("evaluate", "model")),
    "report on no run": Case("no run and no model", ("holds no run", "config.yaml"), command=("report", "."), files={"a": ""}),
    "report on nothing": Case("no run and no model", ("none does not exist",), command=("report", "none")),
    "export of no run": Case("no run and no model", ("not a run's folder",), command=("export", ".", "out")),
    "export of nothing": Case("no run and no model", ("none", "run"), command=("export", "none", "out")),
    "translate with no model": Case("no run and no model", ("is not a model", "config.json"), command=("translate", "here", "Hello."), files={"here/a": ""}),
    "translate without languages": Case("no run and no model", ("--from", "--to"), command=("translate", "model", "Hello.")),
    "resume from nothing": Case("no run and no model", ("no checkpoint at none",), command=("train", "c.yaml", "--resume", "none")),
    "export of an unfinished run": Case("no run and no model", ("no model/ yet", "--resume auto", "--checkpoint"), command=("export", "half", "out"), files={"half/config.yaml": "a: 1"}),
    "unfinished run": Case("no run and no model", ("no model/ yet", "--resume auto"), command=("generate", "half", "--prompt", "a"), files={"half/config.yaml": "a: 1"}),
    # --- usage
    "two inputs": Case("usage", ("not both",), command=("translate", "model", "Hello.", "--input", "a.txt"), files={"a.txt": "a"}),
    "output without input": Case("usage", ("--input",), command=("translate", "model", "--output", "b.txt")),
    "input missing": Case("usage", ("the input none.txt", "looked in"), command=("translate", "model", "--from", "en", "--to", "fr", "--input", "none.txt", "--output", "b.txt")),
    "input is not text": Case("usage", ("x.txt is not UTF-8",), command=("translate", "model", "--from", "en", "--to", "fr", "--input", "x.txt"), files={"x.txt": b"\xff\xfe"}),
    "negative temperature": Case("usage", ("generation: temperature = -1.0", "greater than or equal to 0"), command=("generate", "model", "--prompt", "a", "--temperature", "-1")),
    "too large a top-p": Case("usage", ("top_p = 2.0", "less than or equal to 1"), command=("chat", "model", "--top-p", "2")),
    "prompt beyond the model": Case("usage", ("tokens", "128"), command=("generate", "model", "--prompt", "word " * 300)),
    "unknown command": Case("usage", ("'trian'", "train"), command=("trian", "c.yaml")),
    "unknown option of a command": Case("usage", ("--resum", "--resume", "finetune train --help"), command=("train", "c.yaml", "--resum", "auto")),
    "no argument": Case("usage", ("CONFIG",), command=("train",)),
    "unknown task": Case("usage", ("'sums'", "chat"), command=("demo", "sums")),
}  # fmt: skip


@pytest.fixture
def copy(finished, folder) -> Path:
    """The working directory, with a copy of what `finished` has."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


def assert_one_sentence(result: Result, *says: str) -> None:
    *progress, last = result.err.splitlines() or [""]
    assert last.startswith("finetune: "), result.err
    sentence = last.removeprefix("finetune: ")
    assert result.code == 2
    assert result.out == ""
    assert not [
        line for line in progress if line.startswith(("finetune: ", "Traceback", "  File"))
    ], result.err
    sentences = re.split(r"(?<=[a-z0-9)\]'][.!?]) (?=[A-Z])", sentence)
    assert len(sentences) <= 2, f"what is wrong, then what to do, and no more: {sentence}"
    assert not sentence.endswith("."), sentence
    assert len(sentence) < 500, sentence
    missing = [text for text in says if text not in sentence]
    assert not missing, f"{missing} not in: {sentence}"


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_sentence_and_leaves_everything_as_it_was(
    name, folder, write_config, finished
):
    case = CASES[name]
    write_config(**case.config)
    for path, content in case.files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    if "model" in case.command:
        shutil.copytree(finished / "run" / "model", folder / "model")
    before = snapshot(folder)
    result = finetune(*case.command)
    assert_one_sentence(result, *case.says)
    assert snapshot(folder) == before


OTHER_TESTS = {
    "label outside the vocabulary": 2,
    "out of disk": 7,
    "another run in the folder": 1,
    "changed model or data": 4,
}


def test_every_line_of_the_list_has_its_cases():
    counts = {
        line: sum(case.line == line for case in CASES.values()) + OTHER_TESTS.get(line, 0)
        for line in LINES
    }
    assert {case.line for case in CASES.values()} | OTHER_TESTS.keys() == set(LINES)
    assert min(counts.values()) >= 1, counts
    assert len(CASES) >= 100


def test_another_run_in_the_folder_is_not_touched(copy):
    before = snapshot(copy)
    result = finetune("train", "c.yaml")
    assert_one_sentence(
        result, "run holds another run", "--resume auto", "output_dir", "overwrite_output_dir=true"
    )
    assert snapshot(copy) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.config.num_hidden_layers=1", "the model changed"),
        ("data.targets=all", "the training data changed"),
        ("training.batch_size=8", "training.batch_size changed (then 4, now 8)"),
        ("optimizer.name=sgd", "optimizer.name changed (then lazy_adamw, now sgd)"),
    ],
)
def test_a_run_with_another_model_or_other_data_is_not_resumed(copy, change, says):
    before = snapshot(copy)
    result = finetune("train", "c.yaml", change, "--resume", "auto")
    assert_one_sentence(result, "step-00000002 cannot be resumed", says, "another output_dir")
    assert snapshot(copy) == before


def test_a_stream_without_targets_ends_before_the_first_step(folder, write_config):
    """The first rows of a stream are looked at before the run is started."""
    write_config(data={"max_length": 4, "validation_fraction": 0.0, "streaming": True})
    result = finetune("train", "c.yaml")
    assert_one_sentence(
        result, "no target tokens in 48 records", "48 without a target", "Raise data.max_length"
    )
    assert not (folder / "run").exists()


def test_a_mistake_with_overwrite_deletes_nothing(copy):
    before = snapshot(copy)
    assert_one_sentence(
        finetune("train", "c.yaml", "overwrite_output_dir=true", "data.format=text"),
        "format 'text'",
        "messages",
    )
    assert snapshot(copy) == before


def in_a_process(*arguments: str, file_size: int | None = None, **environment: str) -> Result:
    """`python -m finetune ARGUMENTS`, allowed files of at most so many bytes."""

    def limit() -> None:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    done = subprocess.run(
        [sys.executable, "-m", "finetune", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_label_outside_the_vocabulary(copy, command):
    """A tokenizer of 300 entries beside a model of 280 rows."""
    folder = copy / "run" / "model"
    settings = {name: value for name, value in LLAMA.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**settings, vocab_size=280)).save_pretrained(folder)
    before = snapshot(copy)
    change = ("model={name: run/model}", "output_dir=other")
    result = finetune(
        *(
            ("train", "c.yaml", *change)
            if command == "train"
            else ("evaluate", "run/model", *change, "--config", "c.yaml")
        )
    )
    assert_one_sentence(
        result,
        "chat.jsonl line ",
        "is outside the model's vocabulary of 280 rows",
        "the tokenizer does not belong",
    )
    assert snapshot(copy) == before


@pytest.mark.slow
def test_out_of_disk_leaves_the_previous_checkpoint_and_a_run_that_resumes(copy):
    checkpoint = snapshot(copy / "run" / "checkpoints")
    full = in_a_process(
        "train", "c.yaml", "training.max_steps=4", "--resume", "auto", file_size=60_000
    )
    assert_one_sentence(
        full,
        "the checkpoint of step 3 could not be written",
        "File too large",
        "step-00000002 is untouched",
    )
    assert snapshot(copy / "run" / "checkpoints") == checkpoint
    again = finetune("train", "c.yaml", "training.max_steps=4", "--resume", "auto")
    assert again.code == 0, again.err
    assert "resuming after step 2" in again.err
    steps = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "environment.json", "data.json", "evaluation.json"]
)
def test_out_of_disk_in_any_file_of_a_run(copy, name):
    """The file that is written is a link to a device that is always full."""
    written = copy / "run" / (name if name.endswith(".jsonl") else f"{name}.tmp")
    written.unlink(missing_ok=True)
    written.symlink_to("/dev/full")
    kept = (copy / "run" / name).read_text() if name.endswith(".json") else None
    checkpoint = snapshot(copy / "run" / "checkpoints" / "step-00000002")
    result = finetune(
        "train",
        "c.yaml",
        "training.max_steps=3",
        "checkpoint.every=3",
        "evaluation.every=3",
        "--resume",
        "auto",
    )
    step = "step-00000003" if name == "evaluation.json" else "step-00000002"
    assert_one_sentence(
        result, f"run/{name} could not be written: No space left on device", f"{step} is untouched"
    )
    assert snapshot(copy / "run" / "checkpoints" / "step-00000002") == checkpoint
    if kept is not None:
        assert (copy / "run" / name).read_text() == kept


def test_out_of_disk_outside_of_a_run(folder):
    (folder / "out").mkdir()
    (folder / "out" / "beale.svg").symlink_to("/dev/full")
    result = finetune(
        "landscape",
        "--functions",
        "beale",
        "--optimizers",
        "sgd",
        "--steps",
        "3",
        "--output",
        "out",
    )
    assert result.code == 2
    assert result.err == "finetune: a file could not be written: No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_does_not_answer_is_given_up_in_seconds(kind, folder, write_config):
    """A server that takes connections and says nothing: the worst kind of out of reach."""
    write_config(
        **(
            {"model": {"config": None, "tokenizer": None, "name": "some/name"}}
            if kind == "model"
            else data("some/name")
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
        started = time.monotonic()
        result = in_a_process(
            "train", "c.yaml", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint, NO_PROXY="127.0.0.1"
        )
        seconds = time.monotonic() - started
    assert_one_sentence(
        result, "'some/name'", "not found", str(folder), "reach" if kind == "dataset" else "reached"
    )
    assert seconds < 60
