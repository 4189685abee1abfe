"""`finetune evaluate`: the metrics of a finished run, or of any model."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from finetune.config import RunConfig
from finetune.config.schema import DataSection
from finetune.display import Display, plain_console
from finetune.errors import UserError, is_terminal, visible
from finetune.models.language_model import LanguageModel
from finetune.recipes.build.accelerator import make_accelerator
from finetune.recipes.build.data import generation_metrics
from finetune.recipes.build.evaluator import Evaluator
from finetune.recipes.build.look import evaluation_config, look_at_target, no_held_out_data
from finetune.recipes.build.material import read_material
from finetune.recipes.build.sharing import sharing_obstacle
from finetune.recipes.build.target import Opened, open_target
from finetune.run.claim import locked
from finetune.run.files import finite
from finetune.run.folder import RunDir
from finetune.run.metrics import METRICS
from finetune.run.records import Evaluations, Vocabulary


def evaluate_target(
    target: str,
    *,
    config: Path | None,
    overrides: Sequence[str],
    as_json: bool = False,
    trust: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Evaluate on data.test, or on the held-out data if there is none; print the metrics.

    They are a table at a terminal, and JSON elsewhere or with `as_json`.

    If a run is evaluated with its own config, its evaluation.json keeps the metrics as "test",
    unless the run was trained meanwhile. `trust`: run the code that comes with the model. Raises
    UserError for a target that cannot be opened, and for a config without held-out data.
    """
    display = display or Display()
    own = look_at_target(target) if config is None and not overrides else None
    trained = None if own is None else _of_training(own)
    opened = open_target(target, trust=trust)
    settings = evaluation_config(target, opened.run, config, overrides, trust=trust)
    results = evaluate_opened(opened, settings, display)
    if as_json or not is_terminal(sys.stdout):
        print(json.dumps(finite(results), indent=2))
    else:
        _print_table(results)
    if own is not None:
        _keep(results, own, trained, display)
    return results


def _of_training(run: RunDir) -> dict[str, Any]:
    """Return what evaluation.json holds, but for figures on test data. Raises UserError."""
    return finite(replace(Evaluations.read(run), test=None).as_dict())


def _keep(
    results: Mapping[str, Any], run: RunDir, trained: Mapping[str, Any] | None, display: Display
) -> None:
    """Put the metrics into evaluation.json, if it is still as `trained`; else warn."""
    try:
        with locked(run.root, display.note):
            if _of_training(run) != trained:
                raise UserError(f"{run.root} was trained meanwhile. Evaluate it again")
            replace(Evaluations.read(run), test=results).write(run)
    except UserError as error:
        display.warn(f"these metrics are not kept in {run.evaluation}: {error}")


def _print_table(results: Mapping[str, Any]) -> None:
    """Print the metrics with their names and units, and what they were measured on."""
    table = Table(title=visible(str(results["data"])), title_justify="left", show_header=False)
    for metric in METRICS:
        if metric.key in results:
            table.add_row(metric.name, metric.show(results), metric.unit)
    console = plain_console(soft_wrap=True)
    console.print(table)
    console.print(f"{results['num_records']:,} records, {results['precision']}")
    if number := results.get("num_generated"):
        console.print(f"answers: to the first {number:,} prompts")
    for key, value in results.items():
        if key.endswith("signature"):
            console.print(f"{value}")


def evaluate_opened(opened: Opened, settings: RunConfig, display: Display) -> dict[str, Any]:
    """Return the metrics of a model on the test data of a config, or on its held-out data.

    Raises UserError if there is none.
    """
    if settings.data.system_prompt is not None:
        display.say(f"system prompt: {settings.data.system_prompt}")
    material = read_material(
        _evaluation_config(_with_its_split(settings, opened.config), opened.model.device.type),
        display,
        trained=(opened.model, opened.tokenizer),
    )
    if (held_out := material.raw.validation) is not None and settings.data.test is None:
        held_out = held_out.take(settings.data.max_validation_records)
        material = replace(material, raw=replace(material.raw, validation=held_out))
    if material.validation is None:  # it is encoded now: the format knows whether tools are called
        raise no_held_out_data()
    accelerator = make_accelerator(material.config, Display(enabled=False))
    unused = _unused_tokens(opened.run, material.table_rows)
    scored = generation_metrics(settings, material.format)
    language_model = LanguageModel(opened.model)
    obstacle = sharing_obstacle(material.config, opened.model, language_model)
    evaluator = Evaluator(
        material,
        language_model,
        accelerator,
        num_answers=settings.evaluation.generate if scored else 0,
        display=display,
        inactive=lambda: unused,
        share=obstacle is None and material.config.training.share_prefixes is not False,
    )
    results = {
        "data": _data_in_words(settings.data),
        "num_records": material.validation.statistics.records,
        "precision": "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
    }
    results |= evaluator.evaluate()[0]
    if evaluator.prompts:
        results["num_generated"] = len(evaluator.prompts)
    return results


def _with_its_split(settings: RunConfig, own: RunConfig | None) -> RunConfig:
    """Return the settings so that they hold out what the run `own` held out of its data.

    Raises UserError for settings that would evaluate on what the run was trained on.
    """
    if own is None or settings.data.test or settings.data.validation:
        return settings
    then, now = _sources(own), _sources(settings)
    if not {source["path"] for source in then} & {source["path"] for source in now}:
        return settings
    split = own.data.validation_fraction if own.data.validation is None else None
    changed = {
        "data.train": then != now,
        "data.validation": split is None,
        "data.validation_fraction": split != settings.data.validation_fraction,
        "seed": own.seed != settings.seed,
    }
    for key, differs in changed.items():
        if differs:
            raise UserError(
                f"{key} is not what the run had, so it would be evaluated on records that it was "
                "trained on. Leave it as it was, or give data.test"
            )
    most = {"max_validation_records": own.data.max_validation_records}
    return settings.model_copy(update={"data": settings.data.model_copy(update=most)})


def _sources(config: RunConfig) -> list[dict[str, Any]]:
    """Return the sources that a config holds data out of, with whole paths of files."""
    found = []
    for source in config.data.train:
        place = Path(source.path)
        path = str(place.resolve() if place.exists() else place)
        found.append({**source.model_dump(), "path": path})
    return found


def _evaluation_config(config: RunConfig, device: str) -> RunConfig:
    """Return the config with its test data, if it has any, in the place of its held-out data.

    Trackers and compilation are left out. The precision is that of the run's own evaluations, but
    float32 instead of fp16 without CUDA.
    """
    changes: dict[str, Any] = {"tracking": ()}
    if config.data.test is not None:
        test = {"validation": config.data.test, "max_validation_records": None}
        changes["data"] = config.data.model_copy(update=test)
    off_cuda = config.training.precision == "fp16" and device != "cuda"
    precision = {"precision": "fp32"} if off_cuda else {}
    changes["training"] = config.training.model_copy(
        update={"compile": False, "device": device, **precision}
    )
    return config.model_copy(update=changes)


def _unused_tokens(run: RunDir | None, vocab_size: int) -> torch.Tensor | None:
    """Return [V] bool, true for tokens that the run did not use.

    It is None if the run used all tokens, or if it left no record of them. Raises UserError for a
    recorded token that the model does not have.
    """
    if run is None or not (used := Vocabulary.read(run).used):
        return None
    if (wrong := next((id for id in used if not 0 <= id < vocab_size), None)) is not None:
        raise UserError(
            f"{run.vocabulary} names the token {wrong}, and the model has the tokens 0 to "
            f"{vocab_size - 1}. Copy that file again, or delete it"
        )
    unused = torch.ones(vocab_size, dtype=torch.bool)
    unused[list(used)] = False
    return unused if unused.any() else None


def _data_in_words(data: DataSection) -> str:
    """Return which data of the config is evaluated on."""
    key, sources = ("test", data.test) if data.test is not None else ("validation", data.validation)
    if sources is None:
        return "the part of data.train that is held out"
    return f"data.{key}: {', '.join(source.path for source in sources)}"
