"""The export of a trained model, as a plain Hugging Face folder.

It has the weights in safetensors, the tokenizer, the template, the generation config and a model
card. An earlier export is whole until the new one is (see `run.replace`).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune.errors import Border, UserError, system_errors
from finetune.models.adapters import ADAPTERS, base_of_adapters, merge_lora, save_adapters
from finetune.models.describe import token_tables
from finetune.models.language_model import evaluating
from finetune.models.vocabulary.activate import full_vocabulary
from finetune.run.replace import discard, replacing


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dest: Path,
    *,
    card: str,
    dtype: torch.dtype | None = None,
    beside: Callable[[PreTrainedModel, Path], None] | None = None,
) -> None:
    """Write `dest`, which `AutoModelForCausalLM.from_pretrained` loads, over an earlier export.

    LoRA is merged into a copy. It is also kept in `adapters/`, if the adapters alone make the
    trained model of a base that has a name. An active vocabulary is written back into the full
    table; the model in memory stays as it is. `card`: the text of README.md (see
    `card.model_card`). `dtype`: of the saved weights; None: as they are. `beside` writes more files
    into the folder, from the plain model. Raises UserError if the disk or transformers refuses, or
    if `dest` has a file that no export wrote.
    """
    try:
        with system_errors(), replacing(dest) as work, full_vocabulary(model):
            plain = merge_lora(model) if isinstance(model, PeftModel) else model
            _write(plain, tokenizer, work, card, dtype)
            if beside is not None:
                beside(plain, work)
            if isinstance(model, PeftModel) and (base := base_of_adapters(model)):
                save_adapters(model, base, tokenizer, work / ADAPTERS)
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        kept = "; the earlier export is untouched" if dest.exists() else ""
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the model could not be written to {dest}: {reason}{kept}") from error


@torch.no_grad()
def verify_export(
    dest: Path,
    model: PreTrainedModel | PeftModel,
    sample_ids: Sequence[int],
    *,
    trust_remote_code: bool = False,
) -> float:
    """Reload the folder and return the largest difference of a logit on `sample_ids`.

    It is a share of the largest logit. Raises UserError if it does not load or run, if the logits
    differ by more than rounding (1e-4; 0.05 for 16-bit weights), or if input and output are tied in
    one model alone. The folder is deleted then: it would be taken for the trained model.
    """
    try:
        return _difference(dest, model, sample_ids, trust_remote_code)
    except UserError as error:
        discard(dest)
        raise UserError(f"{error}. It is deleted") from error


def _difference(
    dest: Path,
    model: PreTrainedModel | PeftModel,
    sample_ids: Sequence[int],
    trust_remote_code: bool,
) -> float:
    """Return the largest difference of a logit. Raises UserError as `verify_export` does."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with Border(f"the export {dest} does not load"):
        reloaded: Any = AutoModelForCausalLM.from_pretrained(dest, dtype="auto", **options)
        AutoTokenizer.from_pretrained(dest, **options)
    bound = 1e-4 if reloaded.dtype == torch.float32 else 0.05
    reloaded.to(model.device, torch.float32)
    ids = torch.tensor([list(sample_ids)], device=model.device)
    with evaluating(model), evaluating(reloaded):
        ours = model(input_ids=ids, use_cache=False).logits
        with Border(f"the export {dest} does not run"):
            theirs = reloaded(input_ids=ids, use_cache=False).logits
    table, head = token_tables(reloaded)
    # transformers ties by the config of the whole, if that says anything
    config = reloaded.config
    decides = config if hasattr(config, "tie_word_embeddings") else config.get_text_config()
    if (head is table) != bool(tied := decides.tie_word_embeddings):
        raise UserError(
            f"the config of the export {dest} has tie_word_embeddings = {tied}, and its weights do "
            "not agree"
        )
    difference = (
        float((ours - theirs).abs().max() / ours.abs().max())
        if ours.shape == theirs.shape
        else float("inf")
    )
    if not difference <= bound:
        raise UserError(
            f"the export {dest} is not the trained model: its logits differ by {difference:.2g} of "
            "the largest"
        )
    return difference


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    dtype: torch.dtype | None,
) -> None:
    # Not the parameters themselves: a lazily trained table is brought up to date here.
    state = model.state_dict()
    if dtype is not None:
        tables: dict[int, torch.Tensor] = {}  # a shared tensor stays shared
        state = {
            name: tables.setdefault(tensor.data_ptr(), tensor.to(dtype))
            if tensor.is_floating_point()
            else tensor
            for name, tensor in state.items()
        }
    model.save_pretrained(folder, state_dict=state)
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
        )
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
