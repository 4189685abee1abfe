"""What a run is made of, built from its config: data, tokenizer, model, format, batches.

Floor 5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs

from finetune.config import RunConfig
from finetune.data.batches.dataset import EvaluationBatches, TrainingBatches
from finetune.data.batches.steps import BatchShape
from finetune.data.batches.stream import StreamingBatches
from finetune.data.encode import DataStatistics, EncodedDataset, RecordEncoder
from finetune.data.sources import Records
from finetune.data.types import Format
from finetune.display import Display
from finetune.errors import UserError, did_you_mean
from finetune.models.language_model import LanguageModel, check_packing
from finetune.models.precision import resolve_precision
from finetune.models.speed import compile_decoder, enable_activation_checkpointing
from finetune.models.tokenizers import set_template
from finetune.recipes.data import RawData, encode_rows, load_raw_data, make_format, unrelated_text
from finetune.recipes.engines import check_engine, settle_engine, waiting_time
from finetune.recipes.model import (
    adapt_model,
    check_length,
    make_model,
    make_tokenizer,
    model_fingerprint,
)
from finetune.recipes.vocabulary import (
    VocabularyKeeper,
    apply_vocabulary,
    plan_vocabulary,
    sample_batches,
)


@dataclass(frozen=True)
class Parts:
    """Everything that a run is made of, built but not started."""

    config: RunConfig
    accelerator: Accelerator
    display: Display
    tokenizer: Any
    model: Any  # the transformers (or peft) model inside `language_model`
    language_model: LanguageModel
    format: Format
    batches: TrainingBatches | StreamingBatches
    statistics: DataStatistics  # of the training data; a stream's grow as it is read
    raw: RawData
    validation: EncodedDataset | None
    unrelated: EncodedDataset | None  # text of another kind
    vocabulary: VocabularyKeeper
    identity: dict[str, str]  # what a resumed run must have in common with the one it goes on with

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.config.training.max_steps is not None:
            return self.config.training.max_steps
        assert isinstance(self.batches, TrainingBatches), "a stream has max_steps"
        return max(1, math.ceil(self.config.training.epochs * self.batches.steps_per_epoch))

    def evaluation_batches(self, dataset: EncodedDataset) -> EvaluationBatches:
        """This process's batches of held-out data."""
        return EvaluationBatches(
            dataset,
            max_length=self.config.data.max_length,
            packing=self.config.data.packing,
            batch_size=self.config.evaluation.batch_size,
            pad_id=pad_id(self.tokenizer),
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )


def make_accelerator(config: RunConfig, display: Display) -> Accelerator:
    """One process on the CPU, one GPU, or this process of many, in the precision that pays here."""
    precision, reason = resolve_precision(
        config.training.precision, "cuda" if torch.cuda.is_available() else "cpu"
    )
    check_trackers(config.tracking)
    check_engine()
    mixed_precision = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()  # one a process: an earlier run here, or its caller, had another precision
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=not torch.cuda.is_available(),
        log_with=list(config.tracking) or None,
        project_dir=str(config.output_dir),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False
            ),  # none changes while a language model trains
            waiting_time(config),
        ],
    )
    display.enabled = display.enabled and accelerator.is_main_process
    settle_engine(accelerator, display)
    display.say(reason)
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that Accelerate does not know, or that is not installed: it would be left out silently."""
    known = list(LOGGER_TYPE_TO_CLASS)
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(
                f"tracking: there is no tracker {name!r}{did_you_mean(name, known)}; known are {', '.join(known)}"
            )
        if name not in installed:
            raise UserError(
                f"tracking: {name} is not installed; install it with: pip install {name.replace('_', '-')}"
            )


def build_parts(config: RunConfig, *, accelerator: Accelerator, display: Display) -> Parts:
    """Read the data, load tokenizer and model, encode. Raises UserError for anything wrong with them."""
    raw = load_raw_data(config.data, seed=config.seed)
    display.say(
        f"loading {config.model.name or 'a random ' + str((config.model.config or {}).get('model_type'))}"
    )
    tokenizer = make_tokenizer(config.model, raw.texts())
    tokens = set_template(tokenizer, config.model.chat_template)
    new_tokens = tokens.added
    model = make_model(config.model, tokenizer, tokens, seed=config.seed)
    check_length(model, config.data.max_length)
    start = model_fingerprint(
        model
    )  # before the optimizer's name has a say in which rows are kept apart
    format = make_format(config.data, tokenizer, raw.first_row)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    batches, statistics, sample = _make_batches(
        config, raw, format, tokenizer, vocab_size, accelerator, display
    )
    validation = None
    if raw.validation is not None:
        validation = encode_rows(
            raw.validation, format, config.data, vocab_size=vocab_size, display=display
        )
    for part, counts in (
        ("training", statistics),
        ("held-out", validation.statistics if validation else None),
    ):
        if counts is not None:
            say_counts(display, part, format, counts, config)
    corpora = [sample, *([validation] if validation else [])]
    sharded = accelerator.distributed_type is DistributedType.FSDP
    vocabulary = plan_vocabulary(config, model, tokenizer, corpora, new_tokens, sharded=sharded)
    display.note(vocabulary.line())
    apply_vocabulary(vocabulary, model, config, bf16=accelerator.mixed_precision == "bf16")
    model = adapt_model(model, config.model, new_tokens, seed=config.seed)
    language_model = LanguageModel(model)
    if config.training.activation_checkpointing:
        enable_activation_checkpointing(language_model)
    if config.data.packing:
        check_packing(language_model)
    if config.training.compile:
        compile_decoder(language_model)
    identity = {
        "the model": start,
        "model.lora": str(config.model.lora),
        "the training data": batches.fingerprint,
        "training.batch_size": str(config.training.batch_size),
        "seed": str(config.seed),
        "optimizer.name": config.optimizer.name,
        "the vocabulary": vocabulary.identity(),
    }
    keeper = VocabularyKeeper(
        config,
        vocabulary,
        language_model,
        lambda: sample_batches(sample, pad_id=pad_id(tokenizer)),
        accelerator,
        display.note,
    )
    return Parts(
        config=config,
        accelerator=accelerator,
        display=display,
        tokenizer=tokenizer,
        model=model,
        language_model=language_model,
        format=format,
        batches=batches,
        statistics=statistics,
        raw=raw,
        validation=validation,
        unrelated=unrelated_text(config, tokenizer, vocab_size),
        vocabulary=keeper,
        identity=identity,
    )


def pad_id(tokenizer: Any) -> int:
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _make_batches(
    config: RunConfig,
    raw: RawData,
    format: Format,
    tokenizer: Any,
    vocab_size: int,
    accelerator: Accelerator,
    display: Display,
) -> tuple[TrainingBatches | StreamingBatches, DataStatistics, EncodedDataset]:
    """The batches, the counts that go with them, and the data itself, or the first rows of a stream."""
    data = config.data
    shape = BatchShape(
        packing=data.packing,
        batch_size=config.training.batch_size,
        micro_batch_size=config.training.micro_batch_size,
        pad_id=pad_id(tokenizer),
        seed=config.seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    if isinstance(raw.train, Records):
        train = encode_rows(raw.train, format, data, vocab_size=vocab_size, display=display)
        return TrainingBatches(train, shape, max_length=data.max_length), train.statistics, train
    if config.training.max_steps is None:
        raise UserError("a stream has no known length: set training.max_steps")
    encoder = RecordEncoder(
        format, max_length=data.max_length, overlong=data.overlong, vocab_size=vocab_size
    )
    stream = StreamingBatches(raw.train, encoder, shape, shuffle_buffer=data.shuffle_buffer)
    return (
        stream,
        encoder.statistics,
        encode_rows(raw.train, format, data, vocab_size=vocab_size, display=display),
    )


def say_counts(
    display: Display, part: str, format: Format, counts: DataStatistics, config: RunConfig
) -> None:
    """How much data there is, and what was cut or left out."""
    if counts.records:
        share = counts.target_tokens / max(1, counts.tokens)
        display.say(
            f"{part}: {counts.examples:,} {format.name} examples, {counts.tokens:,} tokens, {share:.0%} of them targets"
        )
    limit = config.data.max_length
    if counts.truncated or counts.dropped:
        display.note(
            f"{part}: of the examples over {limit} tokens {counts.truncated} were cut ({counts.without_target} of them had no "
            f"target left and were left out) and {counts.dropped} dropped; the longest has {counts.longest} tokens "
            f"(data.max_length, data.overlong)"
        )
