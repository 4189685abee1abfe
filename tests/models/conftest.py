"""Tiny random models of the architectures that people fine-tune, and a tokenizer for them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from finetune.models.load import ModelSpec, load_model
from finetune.models.tokenizers import train_tokenizer

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
WINDOW = {
    "sliding_window": 3,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}

KINDS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {"model_type": "llama", **SMALL, **HEADS},
    "qwen2": {"model_type": "qwen2", **SMALL, **HEADS, "tie_word_embeddings": True},
    "gemma3": {
        "model_type": "gemma3_text",
        **SMALL,
        **HEADS,
        **WINDOW,
        "final_logit_softcapping": 1.5,
    },
    "gpt_neox": {"model_type": "gpt_neox", **SMALL, "num_attention_heads": 4},
    "phi": {"model_type": "phi", **SMALL, "num_attention_heads": 4},
    "cohere": {"model_type": "cohere", **SMALL, **HEADS, "logit_scale": 0.25},
    "granite": {"model_type": "granite", **SMALL, **HEADS, "logits_scaling": 8.0},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
}
EAGER = {"bloom"}  # no sdpa in transformers


@pytest.fixture
def make_model():
    """make_model("gpt2", vocab_size=97, **config).

    Its weights are large enough for the context to matter, and no bias is 0.
    """

    def make(kind, vocab_size=97, **options):
        torch.manual_seed(0)
        attention = "eager" if kind in EAGER else "sdpa"
        model = load_model(
            ModelSpec(
                config=KINDS[kind] | options, vocab_size=vocab_size, attn_implementation=attention
            )
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and "ln_" not in name:
                    parameter.normal_(std=0.2)
        return model

    return make


@pytest.fixture
def make_reader_of_pictures():
    """make_reader_of_pictures(vocab_size=97, **config): a Gemma 3 whose text model is a part."""

    def make(vocab_size=97, *, of_text=None, **options):
        torch.manual_seed(0)
        text = {**KINDS["gemma3"], "vocab_size": vocab_size, **(of_text or {})}
        sight = {**SMALL, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
        config = Gemma3Config(
            text_config=text, vision_config=sight, mm_tokens_per_image=4, **options
        )
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def base_tokenizer_folder(tmp_path_factory):
    """A tokenizer as a base model has it: an end-of-text token, neither markers nor template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    raw.train_from_iterator(
        ["a few words to learn from"],
        trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer():
    return train_tokenizer(["What is this?", "It is a test of a few words."] * 5, 300)
