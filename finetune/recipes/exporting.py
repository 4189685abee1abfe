"""`finetune export`: a run's model, or one of its checkpoints, as a plain Hugging Face folder.

Floor 5.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint import find_checkpoint, load, step_of
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
from finetune.recipes.data import encode_rows, load_raw_data, make_format
from finetune.recipes.evaluating import logged_evaluations
from finetune.recipes.model import adapt_model, load_trained, make_model, make_tokenizer
from finetune.recipes.optimizer import optimizer_options
from finetune.recipes.vocabulary import apply_saved_vocabulary
from finetune.report.facts import METRICS
from finetune.run_dir import RunDir
from finetune.trainer import restore

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
        step, evaluations = step_of(folder), logged_evaluations(run)
        card = run_card(
            run,
            config,
            {
                f"step {number}": evaluations[number]
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


def run_card(run: RunDir, config: RunConfig, evaluations: Mapping[str, dict[str, Any]]) -> str:
    """The model card of a run, from what lies in its folder. `evaluations`: when -> what was measured then."""
    name = config.model.name
    shown = [
        metric for metric in METRICS if all(metric.key in record for record in evaluations.values())
    ]
    chosen = (
        json.loads(run.vocabulary.read_text(encoding="utf-8")).get("chosen")
        if run.vocabulary.is_file()
        else None
    )
    counts, environment = (
        json.loads(path.read_text(encoding="utf-8")) for path in (run.data, run.environment)
    )
    return model_card(
        title=run.root.resolve().name,
        base_model=name,
        license=license_of(resolve_name(name, revision=config.model.revision))
        if name is not None
        else None,
        data=[
            *(f"{source.path} ({counts['format']})" for source in config.data.train),
            *filter(None, [chosen]),
        ],
        metrics={
            when: {metric.name: metric.value(record) for metric in shown}
            for when, record in evaluations.items()
        },
        config=dump_config(config),
        command=environment["command"],
    )


def _tokenizer_of(run: RunDir, config: RunConfig, checkpoint: Path) -> Any:
    """The tokenizer that a run trains with: that of its model/, or while there is none, made once more."""
    if (run.model / "config.json").is_file():
        return load_tokenizer(
            ModelSpec(name=str(run.model), trust_remote_code=config.model.trust_remote_code)
        )
    raw = load_raw_data(config.data, seed=config.seed) if config.model.name is None else None
    tokenizer = make_tokenizer(config.model, () if raw is None else raw.texts())
    set_template(tokenizer, config.model.chat_template)
    if raw is not None and isinstance(raw.train, Records):  # other data makes another tokenizer
        encoded = encode_rows(
            raw.train,
            make_format(config.data, tokenizer, raw.first_row),
            config.data,
            vocab_size=len(tokenizer),
        )
        if encoded.fingerprint != load(checkpoint, "training.pt")["identity"]["the training data"]:
            raise UserError(
                f"the training data of {run.root} changed, so its tokenizer cannot be made again: restore the data"
            )
    return tokenizer


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
