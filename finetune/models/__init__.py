"""Borders to transformers and peft: loading, tokenizers, adapters, the active vocabulary, export.

For library users, loaded when first used: `activate_vocabulary(model, ids)`, `deactivate_vocabulary(model)` and `with
full_vocabulary(model):` (vocabulary.py), `LanguageModel` (language_model.py).

transformers' own progress bars (per tensor, per shard) are off: the command line shows progress of its own. Downloads keep theirs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

if TYPE_CHECKING:
    from finetune.models.language_model import LanguageModel
    from finetune.models.vocabulary import activate_vocabulary, deactivate_vocabulary, full_vocabulary

__all__ = ["LanguageModel", "activate_vocabulary", "deactivate_vocabulary", "full_vocabulary"]

logging.disable_progress_bar()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'finetune.models' has no attribute {name!r}")
    return getattr(import_module("finetune.models." + ("language_model" if name == "LanguageModel" else "vocabulary")), name)
