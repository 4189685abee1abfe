"""A model without its weights: its modules on the meta device, for counting and planning.

Floor 2. Costs no memory and reads no weight file; a .gguf file is converted first, as for loading.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune.errors import UserError
from finetune.models.load import first_line, load_model
from finetune.models.locate import resolve_name


def load_skeleton(
    *,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    vocab_size: int | None = None,
) -> PreTrainedModel:
    """The model as `load_model` would make it, all of its parameters on the meta device. Raises UserError."""
    with torch.device("meta"):
        if config is not None:
            return load_model(
                config=config, attn_implementation=attn_implementation, vocab_size=vocab_size
            )
        assert name is not None
        place = resolve_name(name, revision=revision)
        try:
            found = AutoConfig.from_pretrained(
                place, revision=revision, trust_remote_code=trust_remote_code
            )
            return AutoModelForCausalLM.from_config(
                found,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                dtype=torch.float32,
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"model {name!r} could not be loaded: {first_line(error)}") from error
