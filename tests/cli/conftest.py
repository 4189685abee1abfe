"""The command line in this process: arguments in; exit code, stdout, stderr and files out."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from finetune.cli import main
from finetune.models.load import ModelSpec, load_model
from finetune.models.tokenizers import train_tokenizer
from tests.conftest import LLAMA, conversation


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def finetune(*arguments: str, stdin: str = "") -> Result:
    """Run `finetune ARGUMENTS`. A process of its own would take four seconds to import torch."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["finetune", *arguments]
    keyboard, sys.stdin = sys.stdin, io.StringIO(stdin)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv, sys.stdin = argv, keyboard
    return Result(code, out.getvalue(), err.getvalue())


def snapshot(root: Path) -> dict[str, bytes]:
    """Return every file and folder below `root` with its content."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b""
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write_config(folder: Path, tiny: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """Return a writer of c.yaml: the tiny config with sections changed, and run/ as its run."""

    def write_config(**sections: Any) -> Path:
        path = folder / "c.yaml"
        path.write_text(yaml.safe_dump({**tiny(**sections), "output_dir": "run"}), encoding="utf-8")
        return path

    return write_config


@pytest.fixture
def base(folder: Path) -> Path:
    """Return the folder of a tiny model with a tokenizer."""
    tokenizer = train_tokenizer(["What is 3 plus 4? It is 7. " * 20, "Le mot est petit."], 300)
    model = load_model(ModelSpec(config=LLAMA | {"max_position_embeddings": 512},
                                 vocab_size=len(tokenizer)))  # fmt: skip
    tokenizer.save_pretrained(folder / "base")
    model.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` caches, here and in the processes started, out of the user's home."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setitem(os.environ, "HF_DATASETS_CACHE", cache)
        yield


def train_in(folder: Path, **sections: Any) -> Path:
    """Write c.yaml in `folder`, train the tiny model for two steps, and return the folder."""
    tree = {
        "output_dir": "run",
        "model": {"config": LLAMA, "tokenizer": {"vocab_size": 300}},
        "training": {"max_steps": 2, "batch_size": 4, "precision": "fp32"},
        "generation": {"max_new_tokens": 4},
        **sections,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with contextlib.chdir(folder):
        result = finetune("train", "c.yaml")
    assert result.code == 0, result.err
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with c.yaml, chat.jsonl and run/, trained on conversations."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "chat.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(48))
    )
    return train_in(
        folder,
        data={"train": "chat.jsonl", "validation_fraction": 0.1, "max_length": 96},
        evaluation={"samples": 1, "before": False},
    )


@pytest.fixture(scope="session")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with c.yaml and run/, trained on pairs of English and French."""
    return train_in(
        tmp_path_factory.mktemp("translator"),
        data={
            "train": {"path": "package:translation.en-fr.train", "max_records": 40},
            "validation": {"path": "package:translation.en-fr.test", "max_records": 6},
            "max_length": 128,
        },
        evaluation={"samples": 2, "generate": 4},
    )
