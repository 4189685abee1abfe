"""An answer does not depend on the prompts beside it, for models of all kinds."""

import logging

import pytest
import torch

from finetune.inference.batching import way_of, window_of
from finetune.inference.generation import GenerationSettings, generate
from finetune.models.load import ModelSpec, load_model

GREEDY = GenerationSettings.greedy(8)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 2}
KINDS = {
    "gpt_neo": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "llama4_text": {
        **GROUPED,
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 64,
        "head_dim": 8,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
    },
    "roformer": {**SMALL, "num_hidden_layers": 2, "embedding_size": 32, "is_decoder": True},
    "bart": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
    },
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        **GROUPED,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mistral": {**GROUPED, "sliding_window": 8},
    "deepseek_v3": {
        **GROUPED,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "llama": GROUPED,
}
PADDING_IS_UNKNOWN = {"bart", "mamba", "mpt"}


def made(kind):
    torch.manual_seed(0)
    spec = ModelSpec(
        config={"model_type": kind, **KINDS[kind]}, vocab_size=97, attn_implementation="sdpa"
    )
    model = load_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and 0 < float(parameter.std()) < 0.2:
                parameter.normal_(std=0.2)
    return model


@torch.inference_mode()
def alone(model, prompt):
    ids = list(prompt)
    for _ in range(8):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_one_of_its_prompt_alone(kind):
    model = made(kind)
    start = [9, 14, 23, 7, 31, 18]
    for prompts in (
        [[*start, 40, 41], [*start, *range(20, 34)], [*start, 55, 60, 71, 20, 33]],
        [[11, 12, 13], [*range(30, 50)], [77, 78, 79, 80, 12, 14, 15], [21, 22, 23]],
    ):
        expected = [alone(model, prompt) for prompt in prompts]
        assert generate(model, prompts, batch_size=4, settings=GREEDY) == expected
        assert len({tuple(answer) for answer in expected}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_slower_is_said_once(kind, caplog):
    model = made(kind)
    with caplog.at_level(logging.WARNING, "finetune"):
        way = way_of(model)
        assert way_of(model) is way
    said = [record for record in caplog.records if "does not know padding" in record.getMessage()]
    assert len(said) == (kind in PADDING_IS_UNKNOWN)
    assert way.pads == (kind not in PADDING_IS_UNKNOWN)
    assert way.shares == (kind in ("llama", "deepseek_v3"))


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"sliding_window": None, "max_window_layers": 21, "chunk_size_feed_forward": 0}, None),
        ({"num_local_experts": 8, "use_sliding_window": False}, None),
        ({"sliding_window": 512, "other_window": 64}, 64),
        ({"attention_chunk_size": 8192}, 8192),
        ({"attn_config": {"local_size": 16}}, 16),
        ({"layer_types": ["full_attention", "sliding_attention"]}, 0),
    ],
)
def test_windows_are_found_in_a_config(config, window):
    assert window_of(config) == window
