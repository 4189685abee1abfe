"""From the model section of a config to a tokenizer and a model.

Floor 5.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import GenerationSection, ModelSection, NewTokenizerSection
from finetune.errors import UserError
from finetune.inference.generation import GenerationSettings
from finetune.models.adapters import add_lora
from finetune.models.describe import context_length
from finetune.models.load import ModelSpec, load_model
from finetune.models.tokenizers import (
    ChatTokens,
    fit_to_tokenizer,
    load_tokenizer,
    stop_ids,
    train_tokenizer,
)
from finetune.models.vocabulary.activate import active_modules


def model_spec(section: ModelSection, tokenizer: Any = None) -> ModelSpec:
    """Return how the section's model is loaded; a random one gets a row for each token."""
    return ModelSpec(
        name=section.name,
        config=section.config,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        attn_implementation=section.attn_implementation,
        vocab_size=len(tokenizer) if section.name is None and tokenizer is not None else None,
    )


def make_tokenizer(section: ModelSection, texts: Iterable[str]) -> Any:
    """Return the model's tokenizer, or for a random model one trained on `texts`."""
    if section.name is None:
        return train_tokenizer(texts, (section.tokenizer or NewTokenizerSection()).vocab_size)
    if section.tokenizer is not None:
        raise UserError(
            "model.tokenizer trains a new tokenizer for model.config; a pretrained model "
            "(model.name) keeps its own. Remove one of the two."
        )
    return load_tokenizer(model_spec(section))


def make_model(section: ModelSection, tokenizer: Any, tokens: ChatTokens, *, seed: int) -> Any:
    """Return the model, fitted to the tokenizer. Random weights come from `seed`."""
    torch.manual_seed(seed)
    model = load_model(model_spec(section, tokenizer))
    fit_to_tokenizer(model, tokenizer, tokens)
    return model


def load_trained(folder: Path, section: ModelSection) -> tuple[Any, Any]:
    """Return the model and the tokenizer that a run has exported to `folder`.

    Flash attention takes 16 bits, as in training, so it is not used here.
    """
    spec = ModelSpec(
        name=str(folder),
        trust_remote_code=section.trust_remote_code,
        attn_implementation="eager" if section.attn_implementation == "eager" else None,
    )
    return load_model(spec), load_tokenizer(spec)


def generation_settings(
    section: GenerationSection, model: Any, *, seed: int | None
) -> GenerationSettings:
    """Return the settings of generation, with the tokens that end the model's answers."""
    settings = section.model_dump(exclude={"batch_size"})
    return GenerationSettings(**settings, stop_ids=stop_ids(model), seed=seed)


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
