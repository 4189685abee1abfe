"""Models as transformers makes them, pretrained or random, always with float32 weights.

Master weights are float32 for any precision of the matrix products (see `speed.py`): in bf16 an
update smaller than 1/256 of a weight would be lost.
"""

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune.errors import UserError, did_you_mean
from finetune.models.locate import resolve_name

_logger = logging.getLogger(__name__)

NO_SDPA = "scaled_dot_product_attention"  # in the error of an architecture without it
AT_LEAST_ONE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it. Exactly one of `name` and `config` is given."""

    name: str | None = None  # see `locate.resolve_name`
    config: Mapping[str, Any] | None = None  # {"model_type": "llama", ...}: random weights
    revision: str | None = None  # of a hub repository
    trust_remote_code: bool = False
    # None: sdpa if the architecture has it, else eager. "sdpa": the same, and eager is logged.
    attn_implementation: str | None = None
    vocab_size: int | None = None  # rows of a random model's token table

    def __post_init__(self) -> None:
        assert (self.name is None) != (self.config is None), (self.name, self.config)


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """Return a causal language model with float32 weights, in evaluation mode.

    Random weights come from torch's global generator. Raises UserError if there is no such model,
    its config is wrong, weights are missing, or it has no such attention.
    """
    name, revision = spec.name, spec.revision
    if name is None:
        return _random_model(spec)
    try:
        place = resolve_name(name, revision=revision)
        model, found = _with_attention(
            spec,
            lambda attention: AutoModelForCausalLM.from_pretrained(
                place,
                revision=revision,
                trust_remote_code=spec.trust_remote_code,
                attn_implementation=attention,
                dtype=torch.float32,
                output_loading_info=True,
            ),
        )
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model {name!r} could not be loaded: {first_line(error)}") from error
    _check_complete(name, model, found["missing_keys"])
    return model


def _check_complete(name: str, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Raise UserError if weights of a pretrained model are missing: they would be random."""
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise UserError(
            f"model {name!r} lacks {len(missing)} of the weights that its config asks for, such as "
            f"{names}. Download it again, or correct its config.json"
        )
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    if isinstance(layers, int) and layers < 1:
        raise UserError(
            f"model {name!r} has no layers: num_hidden_layers is {layers}. Correct its config.json"
        )


def _with_attention(spec: ModelSpec, make: Callable[[str | None], Any]) -> Any:
    """Return what `make` gives for the attention that `spec` asks for.

    An architecture without sdpa gets eager attention, which is logged.
    """
    try:
        return make(spec.attn_implementation)
    except ValueError as error:
        if spec.attn_implementation != "sdpa" or NO_SDPA not in str(error):
            raise
    _logger.warning("attention is eager (model.attn_implementation): this architecture has no sdpa")
    return make("eager")


def load_skeleton(spec: ModelSpec) -> PreTrainedModel:
    """Return the model as `load_model` would, with all parameters on the meta device.

    Takes no memory and reads no weight file; a .gguf file is converted first, as for loading.
    Raises UserError.
    """
    with torch.device("meta"):
        if spec.name is None:
            return load_model(spec)
        place = resolve_name(spec.name, revision=spec.revision)
        try:
            found = AutoConfig.from_pretrained(
                place, revision=spec.revision, trust_remote_code=spec.trust_remote_code
            )
            return _with_attention(
                spec,
                lambda attention: AutoModelForCausalLM.from_config(
                    found,
                    trust_remote_code=spec.trust_remote_code,
                    attn_implementation=attention,
                    dtype=torch.float32,
                ),
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"model {spec.name!r} could not be loaded: {first_line(error)}"
            ) from error


def _random_model(spec: ModelSpec) -> PreTrainedModel:
    assert spec.config is not None
    config = dict(spec.config)
    if spec.vocab_size is not None:
        config["vocab_size"] = spec.vocab_size
    model_config = _make_config(config)
    try:
        model = _with_attention(
            spec,
            lambda attention: AutoModelForCausalLM.from_config(
                model_config, attn_implementation=attention, dtype=torch.float32
            ),
        )
    except KeyError as error:  # a name that is in none of transformers' tables
        wrong = [f"model.config.{key}" for key, value in config.items() if value in error.args]
        raise UserError(
            f"{error} is not known to transformers. Change {' or '.join(wrong or ['model.config'])}"
        ) from error
    # transformers checks few of the values, so a wrong one may raise anything.
    except Exception as error:
        raise UserError(
            f"no {config['model_type']} model can be made from model.config: {first_line(error)}"
        ) from error
    return model.eval()


def _make_config(given: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config of a random model. Raises UserError for a key that is not known.

    transformers accepts any key silently.
    """
    options = dict(given)
    model_type = options.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = did_you_mean(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise UserError(
            f"model.config.model_type {model_type!r} is not a causal language model of "
            f"transformers (e.g. llama, gpt2){near}"
        )
    config_class = CONFIG_MAPPING[model_type]
    standard = config_class()
    known = {*standard.to_dict(), *config_class.attribute_map, *_asked_for(config_class)}
    for key in options:
        if key not in known:
            raise UserError(
                f"model.config has no key {key!r} for {model_type}{did_you_mean(key, known)}"
            )
    for key in AT_LEAST_ONE:
        key = key if key in options else config_class.attribute_map.get(key, key)
        if isinstance(value := options.get(key), int) and value < 1:
            raise UserError(f"model.config.{key} is {value}. Give 1 or more")
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # The default is the full-size model's, which is another token in this vocabulary.
        options.setdefault(token, None)
    try:
        made = config_class(**options)
    except Exception as error:  # as in _random_model
        raise UserError(
            f"model.config is not a {model_type} configuration: {' '.join(str(error).split())}"
        ) from error
    heads, groups = (
        getattr(made.get_text_config(), key, None)
        for key in ("num_attention_heads", "num_key_value_heads")
    )
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise UserError(
            f"model.config: num_attention_heads is {heads}, which num_key_value_heads = {groups} "
            "does not divide"
        )
    return made


def _asked_for(config_class: type[PretrainedConfig]) -> set[str]:
    """Return the keys that a model reads from its config though the class does not declare them.

    Qwen3-MoE's head_dim is one.
    """
    place = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        code = inspect.getsource(importlib.import_module(place))
    except (ImportError, OSError):
        return set()
    return set(re.findall(r'getattr\(\s*(?:self\.)?config,\s*"(\w+)"', code))


def first_line(error: Exception) -> str:
    """Return the first line of an error of transformers, or a clearer sentence."""
    text = str(error)
    # transformers' own sentence asks to open an issue.
    if NO_SDPA in text:
        return "its architecture has no sdpa attention. Set model.attn_implementation: eager"
    if "custom code" in text:
        return (
            "it comes with Python code of its own, which is run only if you trust it. Read that "
            "code, and set model.trust_remote_code: true"
        )
    if (
        found := re.search(r"configuration class <class '[\w.]*\.(\w+)'> for this", text)
    ) is not None:
        return (
            f"{found[1]} is not that of a decoder. Take a causal language model: encoders, and "
            "encoder-decoders such as T5, are not trained here"
        )
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
