"""Models and tokenizers: the border to transformers and peft.

Read `load` and `tokenizers` (in), `language_model` (a batch to its loss), `fuse`, `adapters`,
`vocabulary/`, `rehearsal` (memory without data), `export` and `card` (out).

For library users, loaded when first used: `activate_vocabulary(model, ids)`,
`deactivate_vocabulary(model)`, `with full_vocabulary(model):` and `LanguageModel`; for the loss
with drawn frozen rows also `measure_frozen_rows`, `inclusion_chances` and `FrozenSampler`
(`examples/sampled_vocabulary.py`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.models.language_model import LanguageModel
    from finetune.models.vocabulary.activate import (
        activate_vocabulary,
        deactivate_vocabulary,
        full_vocabulary,
    )
    from finetune.models.vocabulary.frozen_sample import (
        FrozenSampler,
        inclusion_chances,
        measure_frozen_rows,
    )

_MODULES = {
    "vocabulary.frozen_sample": ("FrozenSampler", "inclusion_chances", "measure_frozen_rows"),
    "language_model": ("LanguageModel",),
    "vocabulary.activate": ("activate_vocabulary", "deactivate_vocabulary", "full_vocabulary"),
}

__all__ = [
    "FrozenSampler",
    "LanguageModel",
    "activate_vocabulary",
    "deactivate_vocabulary",
    "full_vocabulary",
    "inclusion_chances",
    "measure_frozen_rows",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"finetune.models.{module}"), name)
    raise AttributeError(f"module 'finetune.models' has no attribute {name!r}")
