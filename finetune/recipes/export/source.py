"""What is exported: the model of a run, one of its checkpoints, or any other model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune.config import RunConfig, load_config
from finetune.data.formats.rendering import TemplateSettings
from finetune.data.sources import Records
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.export import export_model
from finetune.models.load import ModelSpec
from finetune.models.locate import resolve_name
from finetune.models.tokenizers import load_tokenizer, set_template
from finetune.recipes.build.card import run_card
from finetune.recipes.build.material import read_material
from finetune.recipes.build.model import load_trained, make_tokenizer, model_of_checkpoint
from finetune.recipes.build.target import open_target, trusting
from finetune.report.card import base_card, license_of
from finetune.run.files import read_text
from finetune.run.folder import RunDir, step_of
from finetune.run.records import evaluations_by_step
from finetune.training.checkpoint import find_checkpoint, identity_of


@dataclass(frozen=True, eq=False)
class ExportSource:
    """A model, its tokenizer and its card, and the run that it is from, if any."""

    name: str
    model: Any
    tokenizer: Any
    card: str
    run: RunDir | None = None
    config: RunConfig | None = None
    trusted: bool = False  # whether the code that comes with the model is run

    @property
    def template_settings(self) -> TemplateSettings:
        """What the chat template gets in use."""
        options: Mapping[str, Any] = {}
        if self.config is not None:
            options = self.config.data.chat_template_kwargs
        return TemplateSettings(options=options)

    def as_plain(self) -> "ExportSource":
        """Return it with a model of transformers whose parameters are its weights.

        That of a checkpoint may have adapters, compact tables, or rows that lag behind.
        """
        if self.config is None:
            return self
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            export_model(self.model, self.tokenizer, path, card="")
            return replace(self, model=load_trained(path, self.config.model)[0])


def open_source(
    target: str, run: RunDir | None, checkpoint: Path | None, *, trust: bool
) -> ExportSource:
    """Return the model of `run` or one of its checkpoints, or the model that `target` names.

    `trust`: run the code that comes with the model. Raises UserError if there is none.
    """
    if run is not None:
        return _of_run(run, checkpoint, trust=trust)
    opened = open_target(target, trust=trust)
    card = base_card(
        title=Path(target).name, base_model=target, license=license_of(resolve_name(target))
    )
    return ExportSource(_file_name(target), opened.model, opened.tokenizer, card, trusted=trust)


def _file_name(target: str) -> str:
    """Return a name for files: the last part of a path or hub name, without odd characters."""
    last = Path(target.removeprefix("package:")).resolve().name.removesuffix(".gguf")
    return re.sub(r"[^\w.-]+", "-", last)


def _of_run(run: RunDir, checkpoint: Path | None, *, trust: bool) -> ExportSource:
    config = load_config(run.config, trusting(trust))
    name, trusted = _file_name(str(run.root)), config.model.trust_remote_code
    if checkpoint is None:
        model, tokenizer = load_trained(run.model, config.model)
        card = read_text(run.model / "README.md")
        return ExportSource(name, model, tokenizer, card, run, config, trusted)
    folder = find_checkpoint(str(checkpoint), run.checkpoints)
    if folder is None:
        raise UserError(f"the run {run.root} has no complete checkpoint to export")
    if not run.holds(folder):
        raise UserError(f"{folder} is not a checkpoint of {run.root}. Give the folder of its run")
    tokenizer = _tokenizer_of(run, config, folder)
    model = model_of_checkpoint(config, folder, tokenizer)
    evaluations = evaluations_by_step(run)
    metrics = {
        f"step {step}": evaluations[step].metrics
        for step in (0, step_of(folder))
        if step in evaluations
    }
    card = run_card(run, config, metrics)
    return ExportSource(name, model, tokenizer, card, run, config, trusted)


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
    if not isinstance(material.raw.train, Records):  # a stream
        return material.tokenizer
    # other data makes another tokenizer
    if identity_of(checkpoint).get("the training data") != material.train.fingerprint:
        raise UserError(
            f"the training data of {run.root} changed, so its tokenizer cannot be made again. "
            "Restore the data"
        )
    return material.tokenizer
