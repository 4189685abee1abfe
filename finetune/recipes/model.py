"""From the model section of a config to a tokenizer and a model.

Floor 5.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import ModelSection, NewTokenizerSection
from finetune.errors import UserError
from finetune.generation import context_length
from finetune.models.adapters import add_lora
from finetune.models.load import load_model
from finetune.models.tokenizers import load_tokenizer, prepare_chat, train_tokenizer
from finetune.models.vocabulary import active_modules


def make_tokenizer(config: ModelSection, texts: Iterable[str]) -> Any:
    """The model's tokenizer, or for a random model one trained on `texts`."""
    if config.name is not None:
        if config.tokenizer is not None:
            raise UserError(
                "model.tokenizer trains a new tokenizer for model.config; a pretrained model (model.name) keeps its own"
            )
        return load_tokenizer(
            name=config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    return train_tokenizer(texts, (config.tokenizer or NewTokenizerSection()).vocab_size)


def make_model(config: ModelSection, tokenizer: Any, *, seed: int) -> tuple[Any, list[int]]:
    """The model, and the ids of the tokens that the chat template added to it. Random weights come from `seed`."""
    torch.manual_seed(seed)
    model = load_model(
        name=config.name,
        config=config.config,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        vocab_size=None if config.name is not None else len(tokenizer),
    )
    return model, prepare_chat(model, tokenizer, config.chat_template)


def load_trained(folder: Path, config: ModelSection) -> tuple[Any, Any]:
    """The model and the tokenizer that a run has exported to `folder`. Flash attention takes 16 bits, as in training: not here."""
    tokenizer = load_tokenizer(name=str(folder), trust_remote_code=config.trust_remote_code)
    attention = "eager" if config.attn_implementation == "eager" else None
    model = load_model(
        name=str(folder), trust_remote_code=config.trust_remote_code, attn_implementation=attention
    )
    return model, tokenizer


def check_length(model: Any, max_length: int) -> None:
    """Raise UserError where rows of `max_length` tokens would be longer than what the model reads."""
    limit = context_length(model)
    if limit is not None and max_length > limit:
        raise UserError(
            f"data.max_length is {max_length}, and the model reads at most {limit} tokens (its max_position_embeddings): "
            f"set data.max_length={limit}, or less"
        )


def adapt_model(model: Any, config: ModelSection, new_tokens: Sequence[int], *, seed: int) -> Any:
    """The model with LoRA, where it is asked for; rows of an active vocabulary go on training beside it."""
    if config.lora is None:
        return model
    torch.manual_seed(seed)
    trained = {
        parameter
        for module in active_modules(model)
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    wrapped = add_lora(
        model, **config.lora.model_dump(), new_token_ids=() if trained else new_tokens
    )
    for parameter in trained:  # the compact rows, and the shift that they share
        parameter.requires_grad_(True)
    return wrapped


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of every weight's name, shape and some of its values: another one means another model to start from."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
