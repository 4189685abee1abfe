"""`finetune export`: a run's model, or one of its checkpoints, as a plain Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch

from finetune.config import RunConfig, load_config
from finetune.data.sources import Records
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.export import export_model, verify_export
from finetune.models.load import ModelSpec
from finetune.models.tokenizers import load_tokenizer, set_template
from finetune.recipes.build.card import run_card
from finetune.recipes.build.look import look_at_export
from finetune.recipes.build.material import read_material
from finetune.recipes.build.model import load_trained, make_tokenizer, model_of_checkpoint
from finetune.recipes.build.target import trusting
from finetune.run.folder import RunDir, step_of
from finetune.run.records import evaluations_by_step
from finetune.training.checkpoint import find_checkpoint, load

PROBE = "The quick brown fox jumps over the lazy dog."  # the text whose logits are compared
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_run(
    run_root: Path,
    dest: Path,
    *,
    dtype: str,
    checkpoint: Path | None,
    trust: bool = False,
    display: Display | None = None,
) -> None:
    """Write the model to `dest`, reload it from there, and compare the logits.

    `dtype` is a key of DTYPES. `checkpoint`: write the model of this one, not the run's model/.
    `trust`: run the code that comes with the model.
    Raises UserError if there is no such model, or if `dest` exists.
    """
    run, display = look_at_export(run_root, dest, checkpoint), display or Display()
    config = load_config(run.config, trusting(trust))
    if checkpoint is None:
        model, tokenizer = load_trained(run.model, config.model)
        card = (run.model / "README.md").read_text(encoding="utf-8")
    else:
        folder = find_checkpoint(str(checkpoint), run.checkpoints)
        assert folder is not None
        tokenizer = _tokenizer_of(run, config, folder)
        model = model_of_checkpoint(config, folder, tokenizer)
        evaluations = evaluations_by_step(run)
        metrics = {
            f"step {step}": evaluations[step].metrics
            for step in (0, step_of(folder))
            if step in evaluations
        }
        card = run_card(run, config, metrics)
    export_model(model, tokenizer, dest, card=card, dtype=DTYPES[dtype])
    ids = tokenizer(PROBE).input_ids
    difference = verify_export(dest, model, ids, trust_remote_code=config.model.trust_remote_code)
    display.say(
        f"{dest}: written in {dtype} and reloaded. "
        f"Its logits differ from the run's by {difference:.1g} of the largest"
    )


def _tokenizer_of(run: RunDir, config: RunConfig, checkpoint: Path) -> Any:
    """Return the tokenizer that a run trains with.

    It is the one in the run's model/, or if there is none yet, it is made again.
    """
    if (run.model / "config.json").is_file():
        return load_tokenizer(
            ModelSpec(name=str(run.model), trust_remote_code=config.model.trust_remote_code)
        )
    if config.model.name is not None:
        tokenizer = make_tokenizer(config.model, ())
        set_template(tokenizer, config.model.chat_template)
        return tokenizer
    material = read_material(config, Display(enabled=False))
    if isinstance(material.raw.train, Records):
        # other data makes another tokenizer
        then = load(checkpoint, "training.pt")
        known = then.get("identity") if isinstance(then, dict) else None
        now = material.train.fingerprint
        if not isinstance(known, dict) or known.get("the training data") != now:
            raise UserError(
                f"the training data of {run.root} changed, so its tokenizer cannot be made again. "
                "Restore the data"
            )
    return material.tokenizer
