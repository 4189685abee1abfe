"""The conversion of a quantised .gguf file to a plain Hugging Face folder, once.

The folder is written next to its final place and renamed, so a reader sees all of it or nothing.
"""

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.integrations.gguf import is_gguf_arch_supported
from transformers.integrations.gguf.reader import read_gguf_metadata

from finetune.data.encoding.store import hash_bytes
from finetune.errors import Border, UserError, system_errors, visible
from finetune.models.checks import AGAIN, check_number, check_weights
from finetune.models.llama_cpp.pre_tokenizers import cut_as_llama_cpp
from finetune.run.replace import open_to_others

LAYOUT = 4  # raise it if the conversion changes: folders of older layouts are then not used
_INSTEAD = "Take the model's Hugging Face folder"


def cache_dir() -> Path:
    """Return $FINETUNE_CACHE, or ~/.cache/finetune."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune")


def convert_gguf(file: Path) -> Path:
    """Return the folder with the model in float32 and its tokenizer, converted now or earlier.

    A file is known by its name and by every byte that it holds. Users may share a cache. Raises
    UserError if the file cannot be read or converted, or if the cache cannot be written.
    """
    try:
        key = f"{LAYOUT} {hash_bytes(file)}"
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
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
        with system_errors():
            _convert(file, work)
        open_to_others(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its folder is as good
                raise
    except OSError as error:
        raise UserError(
            f"{file} could not be converted into {folder}: {error.strerror or error}. Free some "
            "space there, or set FINETUNE_CACHE to another folder"
        ) from error
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
        metadata, names = read_gguf_metadata(str(file))
    for key, value in metadata.items():
        if isinstance(value, int | float):
            attribute = "num_hidden_layers" if key.endswith(".block_count") else key
            check_number(f"{key} of {file}", attribute, value)
    _check_scaling(file, metadata, names)
    with Border(f"{file} is not a .gguf file that transformers can read", do=AGAIN):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        with _without_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                **options,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # `check_weights` names the weight
                output_loading_info=True,
            )
    model, report = loaded
    check_weights(model, report, str(file))
    _check_all_is_read(file, metadata, _unread(model, metadata, names, report["unexpected_keys"]))
    _check_numbers(file, metadata, model.config)
    _check_scale(file, model.config)
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        cut_as_llama_cpp(tokenizer.backend_tokenizer, metadata.get("tokenizer.ggml.pre"), file)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    if licence := metadata.get("general.license"):
        (folder / "README.md").write_text(
            f"---\nlicense: {licence}\n---\n", encoding="utf-8"
        )  # for `card.license_of`


def _check_scaling(file: Path, metadata: Mapping[str, object], names: Sequence[str]) -> None:
    """Raise UserError if the rotary embeddings are scaled, which transformers does not read.

    llama.cpp keeps the scales of Llama 3 and of Phi 3 in tensors, and the others in the metadata.
    """
    rope = f"{metadata['general.architecture']}.rope"
    kind = metadata.get(f"{rope}.scaling.type")
    factor = metadata.get(f"{rope}.scaling.factor", metadata.get(f"{rope}.scale_linear", 1))
    scales = [name for name in names if name.startswith(("rope_freqs.", "rope_factors_"))]
    if kind is None and factor not in (0, 1):
        kind = "linear"  # as llama.cpp reads it
    if scales or kind not in (None, "none"):
        raise UserError(
            f"{file} scales its rotary embeddings ({visible(scales[0] if scales else str(kind))}), "
            f"which transformers does not read from a .gguf file. {_INSTEAD}"
        )


def _check_numbers(file: Path, metadata: Mapping[str, object], config: PretrainedConfig) -> None:
    """Raise UserError if a number of the file is another one in the config.

    transformers does not read each of them for every architecture (Starcoder 2, StableLM, Phi 3).
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]  # Gemma's layers
    eps = [value for key, value in text.to_dict().items() if key.endswith(("_eps", "_epsilon"))]
    numbers: list[tuple[str, str, list[Any]]] = [
        (
            "rope.freq_base",
            "rotary embeddings of base",
            [part["rope_theta"] for part in kinds if "rope_theta" in part],
        ),
        ("rope.dimension_count", "rotary embeddings of width", _rotary_widths(text, rope)),
        ("attention.layer_norm_epsilon", "norms with an eps of", eps),
        ("attention.layer_norm_rms_epsilon", "norms with an eps of", eps),
        ("attention.sliding_window", "a window of", [getattr(text, "sliding_window", None) or 0]),
    ]
    architecture = metadata["general.architecture"]
    length: Any = metadata.get(f"{architecture}.context_length")
    for key, what, found in numbers:
        given = metadata.get(f"{architecture}.{key}")
        if not isinstance(given, int | float) or not given or not found:
            continue
        if key.endswith("window") and isinstance(length, int) and given >= length:
            continue  # no text is longer
        if not any(math.isclose(given, each, rel_tol=1e-5) for each in found):
            read = f"{found[0]:g}" if found[0] else "none"
            raise UserError(
                f"{file} has {what} {given:g}, and transformers reads {read} from it. {_INSTEAD}"
            )


def _rotary_widths(config: Any, rope: Mapping[str, Any]) -> list[int]:
    """Return how many numbers of a head are rotated; nothing if it is not known."""
    if "rope_type" not in rope:  # none, or some for each kind of layer
        return []
    names = ("rotary_dim", "qk_rope_head_dim")
    stated = [getattr(config, name) for name in names if getattr(config, name, None)]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return stated or [int(width * rope.get("partial_rotary_factor", 1))]


def _check_scale(file: Path, config: PretrainedConfig) -> None:
    """Raise UserError if attention may have another scale: that of Gemma is not in the file."""
    scale = getattr(config, "query_pre_attn_scalar", None)
    width = getattr(config, "head_dim", None)
    if scale is not None and scale != width:
        raise UserError(
            f"{file} has heads of width {width}, and transformers scales their attention as for "
            f"{scale}. {_INSTEAD}"
        )


def _unread(
    model: PreTrainedModel,
    metadata: Mapping[str, object],
    names: Sequence[str],
    unexpected: Sequence[str],
) -> list[str]:
    """Return the tensors of the file that transformers passed over.

    It reports as `unexpected` those of architectures that it reads in its newer way.
    """
    architecture = str(metadata["general.architecture"])
    if is_gguf_arch_supported(architecture):
        return sorted(unexpected)
    reader = modeling_gguf_pytorch_utils
    processor = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)()
    read = reader.get_gguf_hf_weights_map(model, processor)
    # those of experts have no ending there
    return [name for name in names if not {name, name.removesuffix(".weight")} & read.keys()]


def _check_all_is_read(file: Path, metadata: Mapping[str, object], unread: Sequence[str]) -> None:
    """Raise UserError if there are `unread` tensors: without them it is another model."""
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise UserError(
            f"{file} has the weights {visible(unread[0])}{more}, which transformers does not read "
            f"from a .gguf file of {metadata['general.architecture']}. {_INSTEAD}"
        )
