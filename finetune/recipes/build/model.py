"""From the model section of a config to a tokenizer and a model, new or from a checkpoint."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.config import RunConfig
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
    set_template,
    stop_ids,
    train_tokenizer,
)
from finetune.models.vocabulary.activate import active_modules
from finetune.recipes.build.optimizer import make_optimizer
from finetune.recipes.build.vocabulary import apply_saved_vocabulary
from finetune.training.checkpoint import identity_of, load
from finetune.training.restore import restore_checkpoint


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
            "(model.name) keeps its own. Remove one of the two"
        )
    return load_tokenizer(model_spec(section))


def make_model(section: ModelSection, tokenizer: Any, tokens: ChatTokens, *, seed: int) -> Any:
    """Return the model, fitted to the tokenizer. Random weights come from `seed`."""
    torch.manual_seed(seed)
    model = load_model(model_spec(section, tokenizer))
    fit_to_tokenizer(model, tokenizer, tokens)
    return model


def in_float32(section: ModelSection) -> ModelSection:
    """Return the section for a model that is used without autocast.

    Flash attention takes 16 bits, so it is not used there.
    """
    if section.attn_implementation != "flash_attention_2":
        return section
    return section.model_copy(update={"attn_implementation": "sdpa"})


def load_trained(folder: Path, section: ModelSection) -> tuple[Any, Any]:
    """Return the model and the tokenizer that a run has exported to `folder`."""
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
    """Raise UserError if sequences of `max_length` tokens are longer than the model reads."""
    limit = context_length(model)
    if limit is not None and max_length > limit:
        raise UserError(
            f"data.max_length is {max_length}, and the model reads at most {limit} tokens (its "
            f"max_position_embeddings). Set data.max_length={limit}, or less"
        )


def adapt_model(model: Any, config: ModelSection, new_tokens: Sequence[int], *, seed: int) -> Any:
    """Return the model, with LoRA if the config asks for it.

    The rows of an active vocabulary train together with the adapters.
    """
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
    """Return a hash of every weight's name, its shape and some of its values.

    Runs with different fingerprints started from different models.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def model_of_checkpoint(config: RunConfig, checkpoint: Path, tokenizer: Any) -> Any:
    """Return the model as it was at a complete checkpoint of a run with this config.

    Updates of rows may be deferred in a checkpoint, so the optimizer's state is read too. Raises
    UserError if the checkpoint holds changes to a named model alone, such as adapters or some of
    its rows, and the run began with other weights.
    """
    if config.model.name is not None:
        # the tokens of the chat template are added again, with their rows
        tokenizer = make_tokenizer(config.model, ())
    tokens = set_template(tokenizer, config.model.chat_template)
    model = make_model(in_float32(config.model), tokenizer, tokens, seed=config.seed)
    stored = load(checkpoint, "model.pt")
    is_whole = all(f"model.{name}" in stored for name in model.state_dict())
    if (
        config.model.name is not None
        and not is_whole
        and identity_of(checkpoint).get("the model") != model_fingerprint(model)
    ):
        raise UserError(
            f"{checkpoint} is of a run that began with other weights than {config.model.name} "
            "gives now. Restore the model"
        )
    apply_saved_vocabulary(model, config, stored)
    model = adapt_model(model, config.model, tokens.added, seed=config.seed)
    optimizer = make_optimizer(model, config)
    wrapper = torch.nn.Module()
    wrapper.model = model  # as in LanguageModel
    restore_checkpoint(wrapper, optimizer, checkpoint)
    return model
