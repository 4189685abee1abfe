"""What many tests share: a config that trains a random two-layer model in a second or two."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny models gain nothing from threads, and lose much where cores are busy
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _own_cache() -> None:
    """Keep what tests encode out of the user's cache, but use its converted models."""
    found = Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune")
    (found / "gguf").mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="finetune-tests-"))
    (own / "gguf").symlink_to(found / "gguf", target_is_directory=True)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ["FINETUNE_CACHE"] = str(own)


_own_cache()

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "hidden_dropout": 0.1,
}
MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def conversation(number: int) -> dict[str, Any]:
    question = f"What is {number} plus {number % 7}?"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"It is {number + number % 7}."},
        ]
    }


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """48 conversations of one question each."""
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(48)), encoding="utf-8"
    )
    return path


@pytest.fixture
def tiny(tmp_path: Path, chat_file: Path) -> Callable[..., dict[str, Any]]:
    """A config tree for `make_config`: `tiny(training={...}, ...)` replaces keys within sections.

    In float32 on every chip, so that what is equal in theory is equal to many digits.
    """

    def tiny(**sections: Any) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "model": {"config": LLAMA, "tokenizer": {"vocab_size": 300}},
            "data": {"train": str(chat_file), "validation_fraction": 0.1, "max_length": 96},
            "optimizer": {"lr": 3e-3},
            "training": {
                "max_steps": 6,
                "batch_size": 4,
                "micro_batch_size": 4,
                "precision": "fp32",
            },
            "evaluation": {"samples": 1, "generate": 0, "before": False},
            "generation": {"max_new_tokens": 4},
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
        return tree

    return tiny
