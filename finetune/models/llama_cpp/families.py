"""The models that a GGUF file can hold: their sizes by llama.cpp's names, and its order of weights.

llama.cpp turns neighbouring pairs in rotary embeddings of llama, so the rows of q and k are
reordered. Gemma's norms are stored as 1 + w. GPT-2's matrices are transposed, and the queries, keys
and values of a GPT-NeoX head are taken apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor
from transformers import PretrainedConfig

from finetune.errors import UserError

GEMMA_PATTERN = 6  # every sixth layer of Gemma 3 has full attention; llama.cpp knows no other


@dataclass(frozen=True)
class Family:
    """A kind of model: how its config and its weights are written."""

    arch: MODEL_ARCH
    sizes: Callable[[GGUFWriter, Any], None]
    weight: Callable[[str, Tensor, Any], Tensor]  # its name in transformers, itself, the config
    obstacle: Callable[[Any], str | None]  # what in the config llama.cpp does not do
    needs_head: bool = False  # also if it is tied to the token table


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model. Raises UserError if there is none, or if it has an obstacle."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"a {config.model_type} model cannot be written as GGUF here; known are "
            f"{', '.join(FAMILIES)}. Leave out --gguf"
        )
    if (obstacle := family.obstacle(config)) is not None:
        raise UserError(f"this {config.model_type} model {obstacle}. Leave out --gguf")
    return family


def _usual_sizes(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)


def _llama_sizes(writer: GGUFWriter, config: Any) -> None:
    _usual_sizes(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = _head_width(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _gemma_sizes(writer: GGUFWriter, config: Any) -> None:
    _usual_sizes(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_sliding_window(config.sliding_window)


def _gpt2_sizes(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _neox_sizes(writer: GGUFWriter, config: Any) -> None:
    _usual_sizes(writer, config)
    share = _rope(config).get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * _head_width(config)))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _as_it_is(name: str, weight: Tensor, config: Any) -> Tensor:
    return weight


def _llama_weight(name: str, weight: Tensor, config: Any) -> Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if part not in heads:
        return weight
    halves = weight.reshape(heads[part], 2, -1, *weight.shape[1:])  # of each head
    return halves.transpose(1, 2).reshape(weight.shape)


def _gemma_weight(name: str, weight: Tensor, config: Any) -> Tensor:
    return weight + 1 if name.endswith("norm.weight") else weight


def is_transposed(name: str, config: PretrainedConfig) -> bool:
    """Return whether a weight is GPT-2's Conv1D, which multiplies from the other side."""
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return config.model_type == "gpt2" and name.endswith(matrices)


def _gpt2_weight(name: str, weight: Tensor, config: Any) -> Tensor:
    return weight.T if is_transposed(name, config) else weight


def _neox_weight(name: str, weight: Tensor, config: Any) -> Tensor:
    if "query_key_value" not in name:
        return weight
    heads = weight.reshape(config.num_attention_heads, 3, -1, *weight.shape[1:])
    return heads.transpose(0, 1).reshape(weight.shape)


def _llama_obstacle(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"has a sliding window of {window}, and llama.cpp reads it without one"
    return _rope_obstacle(config) or _activation_obstacle(config, "silu")


def _qwen_obstacle(config: Any) -> str | None:
    if "sliding_attention" in config.layer_types:
        return "has layers with a sliding window, and llama.cpp reads them without one"
    if getattr(config, "attention_bias", False):  # of Qwen3
        return "has biases in its attention, which llama.cpp does not read"
    return _rope_obstacle(config) or _activation_obstacle(config, "silu")


def _gemma_obstacle(config: Any) -> str | None:
    usual = [
        "full_attention" if layer % GEMMA_PATTERN == 0 else "sliding_attention"
        for layer in range(1, config.num_hidden_layers + 1)
    ]
    if list(config.layer_types) != usual:
        return f"has full attention elsewhere than in every layer {GEMMA_PATTERN}"
    for kind, theta in (("full_attention", None), ("sliding_attention", 10000.0)):
        rope = config.rope_parameters[kind]
        if rope["rope_type"] != "default" or rope["rope_theta"] != (theta or rope["rope_theta"]):
            return "has rotary embeddings that are scaled"
    if config.query_pre_attn_scalar != config.head_dim:
        return "scales its attention by another number than the width of a head"
    if config.final_logit_softcapping is not None or config.attn_logit_softcapping is not None:
        return "has a soft cap, which llama.cpp does not apply to Gemma 3"
    if config.attention_bias or config.use_bidirectional_attention:
        return "has biases in its attention, or reads in both directions"
    return _activation_obstacle(config, "gelu_pytorch_tanh")


def _gpt2_obstacle(config: Any) -> str | None:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "scales its attention by layer, which llama.cpp does not do"
    return _activation_obstacle(config, "gelu_new", "gelu", "gelu_pytorch_tanh")


def _neox_obstacle(config: Any) -> str | None:
    if not config.attention_bias:
        return "has no biases in its attention, and llama.cpp reads some"
    return _rope_obstacle(config) or _activation_obstacle(
        config, "gelu", "gelu_new", "gelu_pytorch_tanh"
    )


def _rope_obstacle(config: Any) -> str | None:
    kind = _rope(config)["rope_type"]
    return None if kind == "default" else f"has rotary embeddings that are scaled ({kind})"


def _activation_obstacle(config: Any, *allowed: str) -> str | None:
    found = [
        value
        for key in ("hidden_act", "hidden_activation", "activation_function")
        if (value := getattr(config, key, None)) is not None
    ]
    wrong = [value for value in found if value not in allowed]
    return f"has the activation {wrong[0]}, and llama.cpp reads {allowed[0]}" if wrong else None


def _rope(config: Any) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.rope_parameters
    return rope


def _head_width(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


_LLAMA = Family(MODEL_ARCH.LLAMA, _llama_sizes, _llama_weight, _llama_obstacle)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": Family(MODEL_ARCH.GPT2, _gpt2_sizes, _gpt2_weight, _gpt2_obstacle),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, _gemma_sizes, _gemma_weight, _gemma_obstacle),
    "qwen2": Family(MODEL_ARCH.QWEN2, _llama_sizes, _as_it_is, _qwen_obstacle),
    "qwen3": Family(MODEL_ARCH.QWEN3, _llama_sizes, _as_it_is, _qwen_obstacle),
    "gpt_neox": Family(
        MODEL_ARCH.GPTNEOX, _neox_sizes, _neox_weight, _neox_obstacle, needs_head=True
    ),
}
"""model_type of transformers -> the family."""
