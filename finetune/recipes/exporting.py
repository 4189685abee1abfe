"""`finetune export`: a run's model, or one of its checkpoints, as a plain Hugging Face folder.

Floor 5.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.config import RunConfig, dump_config, load_config
from finetune.data.sources import Records
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.card import license_of, model_card
from finetune.models.export import export_model, verify_export
from finetune.models.load import ModelSpec
from finetune.models.locate import resolve_name
from finetune.models.tokenizers import load_tokenizer, set_template
from finetune.optim import build_optimizer
from finetune.recipes.material import read_material
from finetune.recipes.model import adapt_model, load_trained, make_model, make_tokenizer
from finetune.recipes.optimizer import optimizer_options
from finetune.recipes.vocabulary import apply_saved_vocabulary
from finetune.run.folder import RunDir, step_of
from finetune.run.metrics import METRICS
from finetune.run.records import DataCounts, Environment, Vocabulary, evaluations_by_step
from finetune.training.checkpoint import find_checkpoint, load
from finetune.training.trainer import restore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_run(
    run_root: Path,
    dest: Path,
    *,
    dtype: str,
    checkpoint: Path | None,
    display: Display | None = None,
) -> None:
    """Write the model to `dest`, reload it from there, and compare the logits. Raises UserError."""
    run, display = RunDir(run_root), display or Display()
    if not run.is_run():
        raise UserError(f"{run_root} is not a run's folder: there is no {run.config.name} in it")
    if dest.exists():
        raise UserError(f"{dest} is already there; name a folder that does not exist yet")
    if checkpoint is None and not (run.model / "config.json").is_file():
        raise UserError(
            f"the run {run_root} has no model/ yet; finish it with `finetune train {run.config} --resume auto`, "
            f"or name one of its checkpoints with --checkpoint"
        )
    config = load_config(run.config)
    if checkpoint is None:
        model, tokenizer = load_trained(run.model, config.model)
        card = (run.model / "README.md").read_text(encoding="utf-8")
    else:
        folder = find_checkpoint(str(checkpoint), run.checkpoints)
        assert folder is not None
        tokenizer = _tokenizer_of(run, config, folder)
        model = model_of_checkpoint(run, folder, tokenizer)
        step, evaluations = step_of(folder), evaluations_by_step(run)
        card = run_card(
            run,
            config,
            {
                f"step {number}": evaluations[number].metrics
                for number in (0, step)
                if number in evaluations
            },
        )
    export_model(model, tokenizer, dest, card=card, dtype=DTYPES[dtype])
    ids = tokenizer("The quick brown fox jumps over the lazy dog.").input_ids
    difference = verify_export(dest, model, ids, trust_remote_code=config.model.trust_remote_code)
    display.say(
        f"{dest}: written in {dtype} and reloaded; its logits differ from the run's by {difference:.1g} of the largest"
    )


def run_card(run: RunDir, config: RunConfig, evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the model card of a run, from its records. `evaluations`: when -> the figures then."""
    name = config.model.name
    shown = [
        metric for metric in METRICS if all(metric.key in record for record in evaluations.values())
    ]
    kind = DataCounts.read(run).format
    return model_card(
        title=run.root.resolve().name,
        base_model=name,
        license=license_of(resolve_name(name, revision=config.model.revision))
        if name is not None
        else None,
        data=[
            *(source.path + (f" ({kind})" if kind else "") for source in config.data.train),
            *([f"vocabulary: {chosen}"] if (chosen := Vocabulary.read(run).chosen) else []),
        ],
        metrics={
            when: {metric.name: metric.value(record) for metric in shown}
            for when, record in evaluations.items()
        },
        config=dump_config(config),
        command=Environment.read(run).command,
    )


def _tokenizer_of(run: RunDir, config: RunConfig, checkpoint: Path) -> Any:
    """The tokenizer that a run trains with: that of its model/, or while there is none, made once more."""
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
        then = load(checkpoint, "training.pt")["identity"]["the training data"]
        if material.train.fingerprint != then:  # other data makes another tokenizer
            raise UserError(
                f"the training data of {run.root} changed, so its tokenizer cannot be made again: "
                "restore the data"
            )
    return material.tokenizer


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
