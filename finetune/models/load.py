"""Models as transformers makes them, pretrained or random, always with float32 weights.

Master weights are float32 for any precision of the matrix products (see `speed.py`): in bf16 an
update smaller than 1/256 of a weight would be lost.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import LogRecord, getLogger
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from finetune.errors import Border, UserError, did_you_mean, reason_of, visible
from finetune.models.checks import (
    check_config,
    check_number,
    check_stops,
    check_weights,
    of_all_layers,
    say_unread,
    settle_tying,
)
from finetune.models.describe import COUNTS_FROM_PADDING
from finetune.models.locate import resolve_name

# The command line shows progress of its own. Downloads keep their bars.
logging.disable_progress_bar()


def _escape(record: LogRecord) -> bool:
    """Escape the control characters in what transformers logs, such as names of a file."""
    record.msg, record.args = visible(record.getMessage()), ()
    return True


for _handler in logging.get_logger("transformers").handlers:
    _handler.addFilter(_escape)

_logger = getLogger(__name__)

NO_SDPA = "scaled_dot_product_attention"  # in the error of an architecture without it
AT_LEAST_ONE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
CAN_BE_UNDONE = ("fp8", "mxfp4")  # quantisations that transformers can take back while loading
OWN_ATTENTION = ("sdpa", "eager")  # that needs no package and no kernel of the hub


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
    if spec.name is None:
        return _random_model(spec)
    place, found = _find(spec)
    with Border(f"model {spec.name!r} could not be loaded", reason=why_refused):
        loaded: Any = _with_attention(
            spec,
            found,
            lambda config: AutoModelForCausalLM.from_pretrained(
                place,
                config=config,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            ),
        )
    model, report = loaded
    model.name_or_path = spec.name  # not that of a folder in a cache
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model {spec.name!r} is a whole model with a LoRA adapter beside it "
            "(adapter_config.json). Move the adapter to another folder, or merge the two"
        )
    _in_float32(model, spec.name)
    check_weights(model, report, spec.name)
    say_unread(model, report, spec.name)
    settle_tying(model, spec.name)
    if not hasattr(model, "generation_config"):  # code of its own without a GenerationMixin
        with Border(f"the generation config of {spec.name!r} could not be read"):
            model.generation_config = _generation_config(place, model.config, spec.revision)
    check_stops(model.generation_config.eos_token_id, f"the generation config of {spec.name!r}")
    return model


def _in_float32(model: PreTrainedModel, name: str) -> None:
    """Let all weights be float32; those of a quantised checkpoint may come in bfloat16.

    Raises UserError if they are still quantised.
    """
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"model {name!r} is quantised, and float32 weights are trained here. Take the model "
            "that it was made of"
        )
    if any(tensor.dtype != torch.float32 for tensor in model.parameters()):
        model.float()


def _generation_config(
    place: str, config: PretrainedConfig, revision: str | None
) -> GenerationConfig:
    """Return the generation config at `place`; without one, that of the model's config."""
    try:
        return GenerationConfig.from_pretrained(place, revision=revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(config)


def _with_attention(
    spec: ModelSpec, config: PretrainedConfig, make: Callable[[PretrainedConfig], Any]
) -> Any:
    """Return what `make` gives for a config with the attention that `spec` asks for.

    An architecture without sdpa gets eager attention, which is logged.
    """
    if spec.attn_implementation is not None:
        config._attn_implementation = spec.attn_implementation  # also of its parts
    try:
        return make(config)
    except ValueError as error:
        if spec.attn_implementation != "sdpa" or NO_SDPA not in str(error):
            raise
    _logger.warning("attention is eager (model.attn_implementation): this architecture has no sdpa")
    config._attn_implementation = "eager"
    return make(config)


def load_skeleton(spec: ModelSpec) -> PreTrainedModel:
    """Return the model as `load_model` would, with all parameters on the meta device.

    Takes no memory and reads no weight file; a .gguf file is converted first, as for loading.
    Raises UserError.
    """
    with torch.device("meta"):
        if spec.name is None:
            return load_model(spec)
        _, found = _find(spec)
        with Border(f"model {spec.name!r} could not be loaded", reason=why_refused):
            return _with_attention(
                spec,
                found,
                lambda config: AutoModelForCausalLM.from_config(
                    config, trust_remote_code=spec.trust_remote_code, dtype=torch.float32
                ),
            )


def _find(spec: ModelSpec) -> tuple[str, PretrainedConfig]:
    """Return where a pretrained model is, and its config with the attention of `spec`.

    An attention that the config itself names is passed over unless it is torch's own: transformers
    would fetch the code of others from the hub.
    """
    assert spec.name is not None
    place = resolve_name(spec.name, revision=spec.revision)
    with Border(f"model {spec.name!r} could not be loaded", reason=why_refused):
        found = AutoConfig.from_pretrained(
            place, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    check_config(found, f"the config of {spec.name!r}")
    found.output_attentions = False  # nobody reads them here, and sdpa could not be saved with them
    scheme = getattr(found, "quantization_config", None)
    if isinstance(scheme, dict) and scheme.get("quant_method") in CAN_BE_UNDONE:
        scheme["dequantize"] = True
    named = found._attn_implementation
    found._attn_implementation = spec.attn_implementation or (  # also of its parts
        named if named in OWN_ATTENTION else None
    )
    return place, found


def _random_model(spec: ModelSpec) -> PreTrainedModel:
    assert spec.config is not None
    config = dict(spec.config)
    if spec.vocab_size is not None:
        config["vocab_size"] = spec.vocab_size
    model_config = _make_config(config)
    unable = f"no {config['model_type']} model can be made from model.config"
    try:
        with Border(unable, but=(KeyError,), reason=why_refused):
            model = _with_attention(
                spec,
                model_config,
                lambda made: AutoModelForCausalLM.from_config(made, dtype=torch.float32),
            )
    except KeyError as error:  # a name that is in none of transformers' tables
        wrong = [f"model.config.{key}" for key, value in config.items() if value in error.args]
        raise UserError(
            f"{error} is not known to transformers. Change {' or '.join(wrong or ['model.config'])}"
        ) from error
    counting = [part for part in model.modules() if hasattr(part, COUNTS_FROM_PADDING)]
    if any(getattr(part, "padding_idx", 0) is None for part in counting):
        raise UserError(
            f"{unable}: its positions are counted from the token of padding. "
            "Set model.config.pad_token_id to a token that no text has"
        )
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
    if "vocab_size" in options and "vocab_size" not in known and config_class.sub_configs:
        raise UserError(
            f"model.config.model_type {model_type!r} has several parts, and a model of text alone "
            f"is trained here. Write {_text_part(standard)}"
        )
    for key in options:
        if key not in known:
            raise UserError(
                f"model.config has no key {key!r} for {model_type}{did_you_mean(key, known)}"
            )
    for key in AT_LEAST_ONE:
        key = key if key in options else config_class.attribute_map.get(key, key)
        if isinstance(value := options.get(key), int) and value < 1:
            raise UserError(f"model.config.{key} is {value}. Give 1 or more")
    for key, value in options.items():
        if isinstance(value, int | float):
            attribute = config_class.attribute_map.get(key, key)
            check_number(f"model.config.{key}", attribute, value)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # The default is the full-size model's, which is another token in this vocabulary.
        options.setdefault(token, None)
    with Border(f"model.config is not a {model_type} configuration"):
        made = config_class(**options)
    heads, groups = (
        of_all_layers(made.get_text_config(), key)
        for key in ("num_attention_heads", "num_key_value_heads")
    )
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise UserError(
            f"model.config: num_attention_heads is {heads}, which num_key_value_heads = {groups} "
            "does not divide"
        )
    return made


def _text_part(config: PretrainedConfig) -> str:
    """Return the type of the part that reads text; llama if it is no model by itself."""
    parts = [getattr(getattr(config, name), "model_type", "") for name in config.sub_configs]
    known = [part for part in parts if part in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return known[0] if known else "llama, for example"


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


def why_refused(error: BaseException) -> str:
    """Return why transformers refuses a model, clearer than its own sentence if that is known."""
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
    return reason_of(error)
