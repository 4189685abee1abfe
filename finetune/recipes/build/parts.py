"""What a run is made of: the second stage, with a model and its batches.

`material` makes the first stage, without weights.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator, DistributedType

from finetune.config import RunConfig
from finetune.config.values import MOST
from finetune.data.batches.dataset import TrainingBatches
from finetune.data.batches.size import steps_of
from finetune.data.batches.steps import BatchShape
from finetune.data.batches.stream import StreamingBatches
from finetune.data.encode import DataStatistics, RecordEncoder
from finetune.data.sources import Records
from finetune.display import Display
from finetune.errors import UserError, reason_of
from finetune.models.describe import inner_model
from finetune.models.language_model import LanguageModel
from finetune.models.probes import check_causal, why_not_packed
from finetune.models.speed import (
    compile_decoder,
    enable_activation_checkpointing,
)
from finetune.models.tokenizers import pad_id
from finetune.optim import rule_of
from finetune.recipes.build.data import overlong_of
from finetune.recipes.build.material import Material
from finetune.recipes.build.model import adapt_model, make_model, model_fingerprint
from finetune.recipes.build.sharing import Sharing, plan_sharing
from finetune.recipes.build.size import (
    batch_size_of,
    idle_processes,
    packed_length_of,
    step_size_in_words,
    with_step_size,
)
from finetune.recipes.build.vocabulary import apply_vocabulary, plan_vocabulary
from finetune.run.wording import clock, counted
from finetune.training.vocabulary import VocabularyKeeper, measuring_batches

NOT_PACKED = "packing is off"  # the beginning of a note
EVALUATIONS = 10  # of a stream or a comparison, if evaluation.every is not set


@dataclass(frozen=True)
class Parts:
    """Everything that a run is made of, built but not started."""

    material: Material
    accelerator: Accelerator
    display: Display
    language_model: LanguageModel
    batches: TrainingBatches | StreamingBatches
    statistics: DataStatistics  # of the training data; a stream's grow as it is read
    vocabulary: VocabularyKeeper
    sharing: Sharing
    identity: dict[str, str]  # what a resumed run must have in common with the one it continues

    @property
    def config(self) -> RunConfig:
        return self.material.config

    @property
    def model(self) -> Any:
        """The transformers (or peft) model inside `language_model`."""
        return self.language_model.model

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return count_steps(self.config, self.batches.steps_per_epoch)


def count_steps(config: RunConfig, steps_per_epoch: int | None) -> int:
    """Return the optimizer steps of a whole run; `steps_per_epoch`: None for a stream.

    It is MOST if a time ends the run. Raises UserError for a stream without a limit.
    """
    if config.training.max_steps is not None:
        return config.training.max_steps
    if config.training.max_time is not None:
        return MOST
    if steps_per_epoch is None:
        raise UserError("a stream has no known length. Set training.max_steps or training.max_time")
    return steps_of(steps_per_epoch, config.training.epochs)


def evaluation_steps(config: RunConfig, steps_per_epoch: int | None) -> int:
    """Return after how many steps a run is evaluated: by default at the end of each epoch.

    A pass over a stream has no known end, so there it is after each tenth of the run.
    """
    every = config.evaluation.every or steps_per_epoch
    return every or math.ceil(count_steps(config, None) / EVALUATIONS)


def evaluation_seconds(config: RunConfig) -> float | None:
    """Return the seconds after which the run of a stream is evaluated, if a time ends it."""
    limit, every = config.training.max_time, config.evaluation.every
    return limit / EVALUATIONS if limit and config.data.streaming and every is None else None


def evaluations_of_stream(config: RunConfig) -> str | None:
    """Return a sentence that says when a stream is evaluated, if the config does not."""
    if not config.data.streaming or config.evaluation.every is not None:
        return None
    steps = counted(evaluation_steps(config, None), "step")
    of = [] if config.training.max_steps is None else [steps]
    if (seconds := evaluation_seconds(config)) is not None:
        of.append(clock(seconds))
    what = "evaluated and saved" if config.checkpoint.every is None else "evaluated"
    return (
        f"evaluation.every is not set, so the run of a stream is {what} after each tenth of it "
        f"({' or '.join(of)})"
    )


def assemble(material: Material, *, accelerator: Accelerator, display: Display) -> Parts:
    """Load the model and make the batches of a run. Raises UserError for anything wrong with them.

    The order is part of the result. The vocabulary is chosen for the model without LoRA, and LoRA
    then freezes all but the rows that train.
    """
    given, material = material, with_step_size(material)
    config = material.config
    batches, statistics = _make_batches(material, accelerator)
    say_counts(display, "training", material.format.name, statistics, config)
    if material.validation is not None:
        said = material.validation.statistics
        say_counts(display, "held-out", material.format.name, said, config)
    if material.unrelated is not None:  # what is wrong with it is said before weights are loaded
        say_counts(display, "unrelated", "text", material.unrelated.statistics, config)
    display.say(f"loading {config.model.name or 'a random ' + model_type(config)}")
    tokens = material.tokens
    model = make_model(config.model, material.tokenizer, tokens, seed=config.seed)
    start = model_fingerprint(model)  # the same for every vocabulary and optimizer
    sharded = accelerator.distributed_type is DistributedType.FSDP
    vocabulary = plan_vocabulary(
        config, model, material.tokenizer, material.corpora, tokens.added, sharded=sharded
    )
    display.note(f"vocabulary: {vocabulary.line()}")
    apply_vocabulary(vocabulary, model, config, bf16=accelerator.mixed_precision == "bf16")
    model = adapt_model(model, config.model, tokens.added, seed=config.seed)
    language_model = _wrap(model, config)
    if config.data.packing and (reason := why_not_packed(language_model)) is not None:
        display.note(f"{NOT_PACKED}, one example a sequence: {reason}")
        data = given.config.data.model_copy(update={"packing": False})
        unpacked = given.with_config(given.config.model_copy(update={"data": data}))
        material = with_step_size(unpacked)
        config = material.config
        batches, statistics = _make_batches(material, accelerator)
    idle = idle_processes(config, accelerator.num_processes)
    for sentence in (step_size_in_words(given.config, config), idle):
        if sentence is not None:
            display.note(sentence)
    sharing = plan_sharing(
        config, material.train, batches.shape, model=model, language_model=language_model
    )
    display.say(f"shared beginnings: {sharing.line()}")
    batches.shape = replace(batches.shape, share=sharing.shares)
    identity = {
        "the model": start,
        "model.lora": str(config.model.lora),
        "data.packing": str(config.data.packing),  # it and the length of a sequence make the steps
        "data.max_length": str(config.data.max_length if config.data.packing else None),
        "data.packed_length": str(config.data.packed_length if config.data.packing else None),
        "data.shuffle_buffer": str(config.data.shuffle_buffer if config.data.streaming else None),
        "the training data": batches.fingerprint,
        "training.batch_size": str(config.training.batch_size),
        "seed": str(config.seed),
        "optimizer.name": rule_of(config.optimizer.name),
        "the vocabulary": vocabulary.identity(),
    }
    keeper = VocabularyKeeper(
        vocabulary,
        language_model,
        batches=lambda: measuring_batches(material.train, pad_id=pad_id(material.tokenizer)),
        accelerator=accelerator,
        num_steps=count_steps(config, batches.steps_per_epoch),
        seed=config.seed,
        note=display.note,
    )
    return Parts(
        *(material, accelerator, display, language_model, batches, statistics, keeper),
        sharing=sharing,
        identity=identity,
    )


def model_type(config: RunConfig) -> str:
    """Return the architecture of a random model."""
    return str((config.model.config or {}).get("model_type"))


def _wrap(model: Any, config: RunConfig) -> LanguageModel:
    """Return the module that maps a batch to its loss, sped up and checked as the config says."""
    try:
        language_model = LanguageModel(model)
        check_causal(language_model)
    except UserError:
        raise
    except Exception as error:  # the code of a model: it may raise anything
        name = type(inner_model(model)).__name__
        raise UserError(
            f"{name} does not read a plain text: {reason_of(error)}. Take another model"
        ) from error
    if config.training.activation_checkpointing:
        enable_activation_checkpointing(language_model)
    if config.training.compile:
        compile_decoder(language_model)
    return language_model


def _make_batches(
    material: Material, accelerator: Accelerator
) -> tuple[TrainingBatches | StreamingBatches, DataStatistics]:
    """Return this process's batches, and the counts of the data that they are made from."""
    config, data = material.config, material.config.data
    shape = BatchShape(
        packing=data.packing,
        batch_size=batch_size_of(config),
        micro_batch_size=config.training.micro_batch_size,
        pad_id=pad_id(material.tokenizer),
        seed=config.seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    if isinstance(material.raw.train, Records):
        batches = TrainingBatches(material.train, shape, max_length=packed_length_of(config))
        return batches, material.train.statistics
    count_steps(config, None)  # raises if the stream has no end
    records = material.raw.train.fresh()
    encoder = RecordEncoder(
        material.format,
        max_length=data.max_length,
        overlong=overlong_of(data, material.format),
        vocab_size=material.table_rows,
        bad=records.bad if data.on_bad_record == "drop" else None,
    )
    stream = StreamingBatches(records, encoder, shape, shuffle_buffer=data.shuffle_buffer)
    records.bad.forget()  # those of the first records, which were looked at
    material.format.notes()
    return stream, encoder.statistics


def say_stream(display: Display, parts: Parts) -> None:
    """Report what was read of a stream, after its run: how much, what is bad, and what not used."""
    assert isinstance(parts.batches, StreamingBatches)
    format, bad = parts.material.format, parts.batches.encoder.bad
    say_counts(display, "training", format.name, parts.statistics, parts.config)
    if bad is not None and bad.count:
        display.warn(f"training: dropped: {bad.sentence()} (data.on_bad_record)")
    for note in format.notes():
        display.note(f"training: {note}")


def say_counts(
    display: Display, part: str, kind: str, counts: DataStatistics, config: RunConfig
) -> None:
    """Report how much data of a kind there is, and what was cut or left out."""
    if counts.records:
        share = counts.target_tokens / max(1, counts.tokens)
        display.say(
            f"{part}: {counts.examples:,} {kind} examples, {counts.tokens:,} tokens, "
            f"{share:.0%} of them targets"
            + (
                f"; {counted(counts.bad_records, 'bad record')} dropped"
                if counts.bad_records
                else ""
            )
        )
    limit, said = config.data.max_length, []
    if counts.split:
        display.note(
            f"{part}: {counts.split:,} texts over {limit:,} tokens were split into several "
            "examples (data.max_length, data.overlong)"
        )
    if counts.truncated:
        said.append(f"{counts.truncated:,} were cut")
    if counts.without_target:
        said.append(f"{counts.without_target:,} of these had no target left and were left out")
    if counts.dropped:
        said.append(f"{counts.dropped:,} were dropped")
    if said:
        display.note(
            f"{part}: of the examples that are longer than {limit:,} tokens {', '.join(said)}; the "
            f"longest has {counts.longest:,} (data.max_length, data.overlong)"
        )
