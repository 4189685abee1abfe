"""Tiny configs of the architectures of transformers, for `check_architectures.py`.

`tiny_config` shrinks every size that it finds in the standard config of an architecture. What that
gets wrong is set by hand in `BY_HAND`.
"""

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CONTEXT = 256  # places

SIZES = {  # patterns of keys -> what they are set to, unless the standard value is smaller
    CONTEXT: r"""(original_)?max_position_embeddings|max_(target|source)_positions|n_positions
        |max_seq_len|n_ctx|context_length|model_max_length""",
    400: r"vocab_size_per_layer_input",
    64: r""".*(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|d_inner|dff|dim_ff)
        |feed_forward_size|expert_ffn_hidden_size|n_inner|mamba_d_ssm""",
    32: r"""hidden_size|d_model|n_embd|emb_dim|(input_|output_)?embedding_size|word_embed_proj_dim
        |backbone_hidden_size|lru_width|embedding_dim|index_n_heads""",
    16: r"mamba_d_head|mamba_head_?dim|(mamba_)?chunk_size|index_topk",
    8: r"""(swa_|index_|global_|linear_(key_|value_)?|v_)?head_dim|kv_channels|dim_head|d_head
        |attention_head_size|.*lora_rank|(mamba_d_|ssm_)?state(_size)?|hidden_size_per_layer_input
        |laurel_rank|(sliding_)?window(_size)?|sliding_window_size|attention_window_size
        |attention_chunk_size|local_attention""",
    4: r"""num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers|n_heads?|num_heads
        |(num_|swa_num_)?((encoder|decoder)_)?attention_heads|qk_(nope|rope)_head_dim|rotary_dim
        |linear_num_value_heads|num_(local_)?experts|n_routed_experts|moe_num_experts
        |mamba_n_heads|n_mamba_heads|mamba_num_heads|mamba_dt_rank|time_step_rank""",
    2: r"""(swa_)?num_key_value_heads|num_kv_heads|num_query_groups|linear_num_(key_)?heads
        |num_experts_per_tok(en)?|moe_topk|moe_k|zero_expert_num""",
    1: r"""(n|num|moe_num)_shared_experts|first_k_dense_replace|num_dense_layers|n_group|topk_group
        |num_expert_group|(mamba_)?n_?groups""",
    0: r"num_nextn_predict_layers|num_kv_shared_layers",
}
COMPUTED = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "hybrid_layer_ids",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "indexer_types",
    "block_types",
)
"""Lists of one entry a layer that a config makes by itself if they are left out."""
TOKENS = r"(bos|eos|pad|eod|sep|cls|mask|unk)_token_id|decoder_start_token_id|forced_eos_token_id"

HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
MLA = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BY_HAND: dict[str, dict[str, Any]] = {
    "longcat_flash": {"head_dim": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "blenderbot": {"encoder_layers": 2, "decoder_layers": 2},
    "gemma3n_text": {"intermediate_size": 64, "altup_num_inputs": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 400,
        "split_ngram_parts": 4,
        "hc_lowrank": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "roc_bert": {"pronunciation_vocab_size": 40, "shape_vocab_size": 40},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": MAMBA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**MAMBA, "layer_types": HYBRID},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlstm": {"hidden_size": 64, "num_heads": 2},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""What `SIZES` gets wrong."""


def tiny_config(model_type: str, vocab_size: int) -> PretrainedConfig:
    """Return a tiny config of an architecture whose table has `vocab_size` rows."""
    standard = _standard(CONFIG_MAPPING[model_type])
    options = _shrunk(standard, vocab_size) | BY_HAND.get(model_type, {})
    return type(standard)(**options)


def decoders() -> list[str]:
    """Return the names of all architectures that transformers has a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str, vocab_size: int) -> PreTrainedModel:
    """Return a random model whose weights are large enough for the context to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type, vocab_size), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and 0 < float(parameter.std()) < 0.2:
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def _standard(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    return config_class()


def _shrunk(config: PretrainedConfig, vocab_size: int) -> dict[str, Any]:
    """Return the options of a tiny config like `config`, its parts included."""
    options: dict[str, Any] = {}
    names = {value: key for key, value in type(config).attribute_map.items()}
    for key, value in config.to_dict().items():
        if key in type(config).sub_configs:
            part = getattr(config, key)
            if part is not None:
                options[key] = _shrunk(part, vocab_size)
        elif key in COMPUTED or (key == "head_dim" and hasattr(config, "qk_rope_head_dim")):
            continue
        elif re.fullmatch(TOKENS, key):
            optional = "None" in str(type(config).__annotations__.get(key, "None"))
            options[key] = None if optional and not key.startswith("pad") else 0
        elif key == "num_key_value_heads" and hasattr(config, "qk_rope_head_dim"):
            options[key] = 4  # latent attention has as many as there are heads
        elif key == "vocab_size":
            options[key] = vocab_size
        elif (
            "dropout" in key
            or "pdrop" in key
            or key == "layerdrop"
            or key.endswith(("layerdrop", "jitter_noise"))
        ):
            if isinstance(value, float):
                options[key] = 0.0
        elif isinstance(value, int) and not isinstance(value, bool):
            for size, pattern in SIZES.items():
                pattern = re.sub(r"\s", "", pattern)
                if re.fullmatch(pattern, key) or re.fullmatch(pattern, names.get(key, "-")):
                    options[key] = min(size, value) if value > 0 and size != CONTEXT else size
                    break
    return options
