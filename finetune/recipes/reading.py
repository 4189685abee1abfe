"""A finished run, or any model, opened to be put to use; `finetune evaluate`.

Floor 5.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config import RunConfig, load_config
from finetune.config.loading import validate
from finetune.config.schema import GenerationSection
from finetune.data.batches.dataset import EvaluationBatches
from finetune.data.encode import EncodedDataset
from finetune.data.sources import Records
from finetune.data.types import Format
from finetune.display import Display, differences
from finetune.errors import UserError
from finetune.evaluation import LossResult, evaluate_generation, evaluate_loss
from finetune.models.language_model import LanguageModel
from finetune.models.load import ModelSpec, load_model
from finetune.models.precision import resolve_precision
from finetune.models.tokenizers import fit_to_tokenizer, load_tokenizer, set_template
from finetune.recipes.data import (
    encode_rows,
    first_prompts,
    generation_metrics,
    load_raw_data,
    make_format,
    unrelated_text,
)
from finetune.recipes.evaluating import sampling
from finetune.recipes.model import check_length, load_trained
from finetune.recipes.parts import pad_id
from finetune.run_dir import RunDir
from finetune.tracking import finite


@dataclass(frozen=True)
class Opened:
    """A model to read with, and the run that it came from, if any."""

    model: Any
    tokenizer: Any
    run: RunDir | None
    config: RunConfig | None

    def settings(self, given: Mapping[str, Any]) -> GenerationSection:
        """The generation settings of the run, or the defaults, changed by those given."""
        section = self.config.generation if self.config is not None else GenerationSection()
        return validate(GenerationSection, {**section.model_dump(), **given}, where="generation")


def open_target(target: str) -> Opened:
    """Load a run's model/, or a model by name, onto the GPU if there is one. Raises UserError."""
    run = RunDir(Path(target))
    is_run = run.is_run()
    if is_run and not (run.model / "config.json").is_file():
        raise UserError(
            f"the run {target} has no model/ yet; finish it with `finetune train {run.config} --resume auto`"
        )
    config = load_config(run.config) if is_run else None
    model: Any
    if config is not None:
        model, tokenizer = load_trained(run.model, config.model)
    else:
        spec = ModelSpec(name=target)
        model, tokenizer = load_model(spec), load_tokenizer(spec)
    fit_to_tokenizer(model, tokenizer, set_template(tokenizer))
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Opened(model, tokenizer, run if is_run else None, config)


def evaluate_target(
    target: str, *, config: Path | None, overrides: Sequence[str], display: Display | None = None
) -> dict[str, Any]:
    """Metrics on data.test, or on the held-out rows where the config names no test data; printed as JSON. For a run evaluated on
    its own config they are added to its evaluation.json as "test"."""
    display = display or Display()
    opened = open_target(target)
    if config is None and opened.run is None:
        raise UserError(
            f"{target} is a model, not a run, so there is no data to evaluate on: give --config FILE"
        )
    settings = load_config(config if config is not None else opened.run.config, overrides)  # type: ignore[union-attr]
    data = settings.data
    check_length(opened.model, data.max_length)
    if data.test is not None:
        data = data.model_copy(update={"validation": data.test, "max_validation_records": None})
    raw = load_raw_data(data, seed=settings.seed)
    if raw.validation is None:
        raise UserError(
            "the config names no held-out data: set data.test, data.validation or data.validation_fraction"
        )
    format = make_format(data, opened.tokenizer, raw.first_row)
    precision, autocast = _precision(settings, opened.model.device)
    results = {
        "data": _said_data(settings),
        "num_records": len(raw.validation),
        "precision": precision,
    }
    vocab_size = opened.model.get_input_embeddings().weight.shape[0]
    dataset = encode_rows(raw.validation, format, data, vocab_size=vocab_size, display=display)
    unrelated, inactive = (
        unrelated_text(settings, opened.tokenizer, vocab_size),
        _unused_tokens(opened.run, vocab_size),
    )
    with autocast:
        results |= _loss_on(opened, dataset, settings, display, inactive).as_dict()
        if unrelated is not None:
            results["unrelated_loss"] = _loss_on(opened, unrelated, settings, display).loss
        results |= _scores_on(opened, raw.validation, format, settings, display, inactive)
    print(json.dumps(finite(results), indent=2))
    if opened.run is not None and config is None and not overrides:
        summary = (
            json.loads(opened.run.evaluation.read_text(encoding="utf-8"))
            if opened.run.evaluation.is_file()
            else {}
        )
        opened.run.evaluation.write_text(
            json.dumps({**summary, "test": finite(results)}, indent=2), encoding="utf-8"
        )
    return results


def _unused_tokens(run: RunDir | None, vocab_size: int) -> torch.Tensor | None:
    """[V] bool, true for tokens that the run did not use; None where it used all, or left no record of it."""
    if run is None or not run.vocabulary.is_file():
        return None
    unused = torch.ones(vocab_size, dtype=torch.bool)
    unused[json.loads(run.vocabulary.read_text(encoding="utf-8"))["used"]] = False
    return unused if unused.any() else None


def _precision(config: RunConfig, device: torch.device) -> tuple[str, torch.autocast]:
    """That of the run's own evaluations; float32 for fp16 off CUDA."""
    wanted = config.training.precision
    precision = (
        "fp32"
        if wanted == "fp16" and device.type != "cuda"
        else resolve_precision(wanted, device)[0]
    )
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return precision, torch.autocast(device.type, dtype, enabled=precision != "fp32")


def _said_data(config: RunConfig) -> str:
    """Which rows of the config those are."""
    data = config.data
    sources = data.validation if data.test is None else data.test
    if sources is None:
        return f"{data.validation_fraction:g} of data.train, held out"
    return f"data.{'validation' if data.test is None else 'test'}: {', '.join(source.path for source in sources)}"


def _loss_on(
    opened: Opened,
    dataset: EncodedDataset,
    config: RunConfig,
    display: Display,
    inactive: Any = None,
) -> LossResult:
    batches = EvaluationBatches(
        dataset,
        max_length=config.data.max_length,
        packing=False,
        batch_size=config.evaluation.batch_size,
        pad_id=pad_id(opened.tokenizer),
    )
    with display.bar("evaluating the loss", len(batches)) as advance:
        return evaluate_loss(
            LanguageModel(opened.model),
            batches,
            tokenizer=opened.tokenizer,
            device=opened.model.device,
            inactive=inactive,
            on_progress=lambda done: advance(1),
        )


def _scores_on(
    opened: Opened,
    rows: Records,
    format: Format,
    config: RunConfig,
    display: Display,
    inactive: Any,
) -> dict[str, Any]:
    metrics = generation_metrics(config, format)
    count, room = config.evaluation.generate if metrics else 0, config.generation.max_new_tokens
    prompts = first_prompts(rows, format, count, model=opened.model, room=room, note=display.note)
    if not prompts:
        return {}
    with display.bar("generating", len(prompts)) as advance:
        scores, _ = evaluate_generation(
            opened.model,
            opened.tokenizer,
            prompts,
            metrics=metrics,
            batch_size=config.generation.batch_size,
            inactive=inactive,
            on_progress=differences(advance),
            **sampling(config.generation, opened.model, seed=config.seed),
        )
    return {**scores, "num_generated": len(prompts)}
