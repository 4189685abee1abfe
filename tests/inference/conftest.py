"""Tiny real models of four architectures, and a tokenizer trained on a few sentences."""

import pytest
import torch

from finetune.models.load import ModelSpec, load_model
from finetune.models.tokenizers import train_tokenizer

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    # Far above the usual 0.02, so that answers differ and do not depend on rounding.
    "initializer_range": 0.4,
}
CONFIGS = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.4,
    },
    "llama": LLAMA_LIKE | {"model_type": "llama", "num_key_value_heads": 2},
    "gpt_neox": LLAMA_LIKE | {"model_type": "gpt_neox"},
    "gemma3_text": LLAMA_LIKE
    | {
        "model_type": "gemma3_text",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 6,  # shorter than prompts and answers
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(scope="session")
def tokenizer():
    texts = [
        "Where is the café?",
        "Où est le café ?",
        "The file was not found.",
        "Le fichier est introuvable.",
        "日本語 🙂",
    ]
    return train_tokenizer(texts, vocab_size=320)


def tiny_model(kind, vocab_size=320):
    torch.manual_seed(1)
    return load_model(
        ModelSpec(
            config=CONFIGS[kind] | {"bos_token_id": None, "eos_token_id": None},
            vocab_size=vocab_size,
        )
    )


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def any_model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama")
