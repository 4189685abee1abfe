"""The model that a checkpoint holds, made again from its run's config."""

from pathlib import Path
from typing import Any

import torch

from finetune.config import load_config
from finetune.models.tokenizers import set_template
from finetune.optim import build_optimizer
from finetune.recipes.build.model import adapt_model, make_model, make_tokenizer
from finetune.recipes.build.optimizer import optimizer_options
from finetune.recipes.build.vocabulary import apply_saved_vocabulary
from finetune.run.folder import RunDir
from finetune.training.checkpoint import load
from finetune.training.trainer import restore


def model_of_checkpoint(run: RunDir, checkpoint: Path, tokenizer: Any) -> Any:
    """The model as it was at a complete checkpoint. Rows may be deferred there, so the optimizer's state is needed as well."""
    config = load_config(run.config)
    if config.model.name is not None:
        tokenizer = make_tokenizer(
            config.model, ()
        )  # so that the tokens of the chat template are added again, with their rows
    tokens = set_template(tokenizer, config.model.chat_template)
    model = make_model(config.model, tokenizer, tokens, seed=config.seed)
    apply_saved_vocabulary(model, config, load(checkpoint, "model.pt"))
    model = adapt_model(model, config.model, tokens.added, seed=config.seed)
    optimizer = build_optimizer(model, config.optimizer.name, **optimizer_options(config))
    wrapper = torch.nn.Module()
    wrapper.model = model  # as in LanguageModel
    restore(wrapper, optimizer, checkpoint)
    return model
