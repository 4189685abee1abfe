"""The conversion of a quantised .gguf file to a plain Hugging Face folder, once.

The folder is written next to its final place and renamed, so a reader sees all of it or nothing.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.integrations.gguf.reader import read_gguf_metadata

from finetune.errors import Border, UserError
from finetune.models.checks import AGAIN, check_number, check_weights

LAYOUT = 2  # raise it if the conversion changes: folders of older layouts are then not used


def cache_dir() -> Path:
    """Return $FINETUNE_CACHE, or ~/.cache/finetune."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune")


def convert_gguf(file: Path) -> Path:
    """Return the folder with the model in float32 and its tokenizer, converted now or earlier.

    A file is known by its name, size and time of change. Raises UserError if the file cannot be
    read or converted, or if the cache cannot be written.
    """
    stat = file.stat()
    key = f"{LAYOUT} {file.name} {stat.st_size} {stat.st_mtime_ns}"
    folder = cache_dir() / "gguf" / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be written ({error}). Set FINETUNE_CACHE to "
            "another folder"
        ) from error
    try:
        _convert(file, work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its folder is as good
                raise
    except OSError as error:
        raise UserError(f"{file} could not be converted into {folder}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


@contextmanager
def _without_bar() -> Iterator[None]:
    """Keep the reader's own progress bar off the terminal; it heeds no setting of transformers."""
    reader: Any = modeling_gguf_pytorch_utils
    shown = reader.tqdm
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = shown


def _convert(file: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    with Border(f"{file} is not a .gguf file that transformers can read", do=AGAIN):
        metadata, _ = read_gguf_metadata(str(file))
    for key, value in metadata.items():
        if isinstance(value, int | float):
            attribute = "num_hidden_layers" if key.endswith(".block_count") else key
            check_number(f"{key} of {file}", attribute, value)
    with Border(f"{file} is not a .gguf file that transformers can read", do=AGAIN):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        with _without_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                **options,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
    model, report = loaded
    check_weights(model, report, str(file))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    if licence := metadata.get("general.license"):
        (folder / "README.md").write_text(
            f"---\nlicense: {licence}\n---\n", encoding="utf-8"
        )  # for `card.license_of`
