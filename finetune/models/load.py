"""Models in, as transformers makes them: pretrained or random, always with float32 weights.

Floor 2. Master weights are float32 whatever the precision of the matrix products (see `precision.py`): in bf16 an update smaller
than 1/256 of a weight would be lost.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune.errors import UserError, did_you_mean
from finetune.models.locate import resolve_name

AT_LEAST_ONE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def load_model(
    *,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    vocab_size: int | None = None,
) -> PreTrainedModel:
    """A causal language model with float32 weights, in evaluation mode.

    Exactly one of `name` (see `locate.resolve_name`) and `config` (`{"model_type": "llama", ...}`: random weights, from torch's
    global random state). `attn_implementation`: None for sdpa where the architecture has it, else eager. `vocab_size`: the rows of
    a random model's token table. Raises UserError where there is no such model, or the config is wrong, or the model has no such
    attention.
    """
    assert (name is None) != (config is None), (name, config)
    if config is not None:
        return _random_model(config, attn_implementation, vocab_size)
    assert name is not None
    try:
        return AutoModelForCausalLM.from_pretrained(
            resolve_name(name, revision=revision),
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            dtype=torch.float32,
        )
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model {name!r} could not be loaded: {first_line(error)}") from error


def _random_model(
    config: dict[str, Any], attn_implementation: str | None, vocab_size: int | None
) -> PreTrainedModel:
    model_config = _make_config(
        config if vocab_size is None else config | {"vocab_size": vocab_size}
    )
    try:
        model = AutoModelForCausalLM.from_config(
            model_config, attn_implementation=attn_implementation, dtype=torch.float32
        )
    except KeyError as error:  # a name that stands in none of transformers' tables
        wrong = [f"model.config.{key}" for key, value in config.items() if value in error.args]
        raise UserError(
            f"{error} is not known to transformers: change {' or '.join(wrong or ['model.config'])}"
        ) from error
    except (
        Exception
    ) as error:  # transformers checks few of the values, so a wrong one may end anywhere
        raise UserError(
            f"no {config['model_type']} model can be made from model.config: {first_line(error)}"
        ) from error
    return model.eval()


def _make_config(given: dict[str, Any]) -> PretrainedConfig:
    """transformers takes any key without a word; here an unknown one is an error."""
    options = dict(given)
    model_type = options.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = did_you_mean(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise UserError(
            f"model.config.model_type {model_type!r} is not a causal language model of transformers (e.g. llama, gpt2){near}"
        )
    config_class = CONFIG_MAPPING[model_type]
    standard = config_class()
    known = {*standard.to_dict(), *config_class.attribute_map}
    for key in options:
        if key not in known:
            raise UserError(
                f"model.config has no key {key!r} for {model_type}{did_you_mean(key, known)}"
            )
    for key in AT_LEAST_ONE:
        key = key if key in options else config_class.attribute_map.get(key, key)
        if isinstance(value := options.get(key), int) and value < 1:
            raise UserError(f"model.config.{key} is {value}: give 1 or more")
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        options.setdefault(
            token, None
        )  # the default is the full-size model's, and any token in another vocabulary
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
            f"model.config: num_attention_heads is {heads}, which num_key_value_heads = {groups} does not divide"
        )
    return made


def first_line(error: Exception) -> str:
    if "scaled_dot_product_attention" in str(
        error
    ):  # transformers' own sentence asks to open an issue
        return "its architecture has no sdpa attention; set model.attn_implementation: eager"
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
