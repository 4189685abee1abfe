"""`finetune export`: a run's model, or one of its checkpoints, as a plain Hugging Face folder.

Floor 5.
"""

from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint import find_checkpoint, load
from finetune.config import load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.export import export_model, verify_export
from finetune.optim import build_optimizer
from finetune.recipes.model import adapt_model, load_trained, make_model
from finetune.recipes.optimizer import optimizer_options
from finetune.recipes.vocabulary import apply_saved_vocabulary
from finetune.run_dir import RunDir
from finetune.trainer import restore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_run(run_root: Path, dest: Path, *, dtype: str, checkpoint: Path | None, display: Display | None = None) -> None:
    """Write the model to `dest`, reload it from there, and compare the logits. Raises UserError."""
    run, display = RunDir(run_root), display or Display()
    if not run.is_run():
        raise UserError(f"{run_root} is not a run's folder: there is no {run.config.name} in it")
    if dest.exists():
        raise UserError(f"{dest} is already there; name a folder that does not exist yet")
    if not (run.model / "config.json").is_file():
        raise UserError(f"the run {run_root} has no model/ yet; finish it with `finetune train {run.config} --resume auto`")
    config = load_config(run.config).model
    model, tokenizer = load_trained(run.model, config)
    if checkpoint is not None:
        model = model_of_checkpoint(run, checkpoint, tokenizer)
    card = (run.model / "README.md").read_text(encoding="utf-8")
    export_model(model, tokenizer, dest, card=card, dtype=DTYPES[dtype])
    ids = tokenizer("The quick brown fox jumps over the lazy dog.").input_ids
    difference = verify_export(dest, model, ids, trust_remote_code=config.trust_remote_code)
    display.say(f"{dest}: written in {dtype} and reloaded; its logits differ from the run's by {difference:.1g} of the largest")


def model_of_checkpoint(run: RunDir, checkpoint: Path, tokenizer: Any) -> Any:
    """The model as it was at a checkpoint. Rows may be deferred there, so the optimizer's state is needed as well."""
    folder = find_checkpoint(str(checkpoint), run.checkpoints)
    assert folder is not None
    config = load_config(run.config)
    model, new_tokens = make_model(config.model, tokenizer, seed=config.seed)
    apply_saved_vocabulary(model, config, load(folder, "model.pt"))
    model = adapt_model(model, config.model, new_tokens, seed=config.seed)
    optimizer = build_optimizer(model, config.optimizer.name, **optimizer_options(config))
    wrapper = torch.nn.Module()
    wrapper.model = model  # as in LanguageModel
    restore(wrapper, optimizer, folder)
    return model
