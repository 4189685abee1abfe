"""What a run reads: records, tokenizer, format, encoded data. No weights are loaded here.

It is the first of two stages, and enough for `finetune inspect`. `parts` makes the second stage of
it, with a model.
"""

import math
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any

from finetune.config import RunConfig
from finetune.data.advice import advice
from finetune.data.bad_records import BadRecords, UnusableRecords
from finetune.data.batches.packing import pack
from finetune.data.batches.size import steps_of
from finetune.data.encode import EncodedDataset, NoTargets
from finetune.data.encoding.kept import said_of_tokenizer
from finetune.data.formats.jinja import prints_the_date
from finetune.data.statistics import without
from finetune.data.types import Format
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import token_tables
from finetune.models.load import load_skeleton
from finetune.models.tokenizers import ChatTokens, set_template
from finetune.recipes.build.data import (
    RawData,
    encode_records,
    format_options,
    load_raw_data,
    make_format,
    unrelated_text,
)
from finetune.recipes.build.model import check_length, make_tokenizer, model_spec


@dataclass(frozen=True, eq=False)
class Material:
    """The data of a run and what it is encoded with.

    A data set is encoded when it is first asked for, and kept. Each of them raises UserError if
    something is wrong with its records.
    """

    config: RunConfig
    display: Display
    raw: RawData  # the records, not yet tokenised
    tokenizer: Any
    tokens: ChatTokens  # those that the chat template added, and those that end an answer
    skeleton: Any  # the model on the meta device, or a trained one: only its sizes are used
    format: Format
    made_from: str  # what the format was made from: it has the same results if this is the same

    @property
    def table_rows(self) -> int:
        """Rows of the token table, with those for tokens that the chat template added."""
        return max(token_tables(self.skeleton)[0].shape[0], 1 + max(self.tokens.added, default=-1))

    @cached_property
    def train(self) -> EncodedDataset:
        """The training data; of a stream, its first records."""
        try:
            encoded = self.encode(self.raw.train)
        except UnusableRecords as error:
            if self.raw.validation is not None:
                self.encode(self.raw.validation, bad=error.bad)  # lists those of both
            raise
        if not self.config.data.drop_duplicates or self.validation is None:
            return encoded
        kept = without(encoded, self.validation)
        if len(kept) == 0:
            raise UserError(
                f"all {len(encoded):,} training examples are also held out, and "
                "data.drop_duplicates leaves them out. Give other held-out data"
            )
        return kept

    @cached_property
    def validation(self) -> EncodedDataset | None:
        """The held-out data."""
        held_out = self.raw.validation
        if held_out is None:
            return None
        try:
            return self.encode(held_out, of=" of the held-out data")
        except NoTargets as error:
            said = f"the held-out data: {error}"
            if self.config.data.validation is None and ". " not in said:  # it was drawn
                said += ". Give data.validation, or another seed"
            raise UserError(said) from error

    @cached_property
    def unrelated(self) -> EncodedDataset | None:
        """Text of another kind (`data.unrelated`)."""
        return unrelated_text(self.config, self.tokenizer, self.table_rows, self.display)

    @property
    def corpora(self) -> list[EncodedDataset]:
        """The training data, and the held-out data if there is any."""
        return [self.train, *([self.validation] if self.validation is not None else [])]

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of a pass over the data; None for a stream."""
        return None if self.config.data.streaming else self._num_steps

    @property
    def examples_per_step(self) -> float:
        """Examples of an optimizer step, on average; for a stream, of its first records."""
        return len(self.train) / self._num_steps

    @cached_property
    def _num_steps(self) -> int:
        """Optimizer steps of a pass over `train`."""
        data, size = self.config.data, self.config.training.batch_size
        assert size != "auto", "finetune.recipes.build.size comes first"
        lengths, most = self.train.lengths, data.packed_length or data.max_length
        sequences = len(pack(lengths, most)) if data.packing else len(lengths)
        return math.ceil(sequences / size)

    def advice(self) -> list[str]:
        """Return what small or odd data does to the run; see `finetune.data.advice`."""
        training, per_epoch = self.config.training, self.steps_per_epoch
        num_steps = None
        is_open = training.max_steps is None and training.max_time is None
        if is_open and per_epoch is not None:
            num_steps = steps_of(per_epoch, training.epochs)
        return advice(
            self.train,
            self.validation,
            num_steps=num_steps,
            per_step=self.examples_per_step,
            max_length=self.config.data.max_length,
        )

    def with_config(self, config: RunConfig) -> "Material":
        """Return the material of a changed config; only a changed data section is encoded anew.

        Packing and its length change no example. The day that the chat template prints stays.
        """
        config = with_template_date(config, self.config.data.template_date)
        changed = replace(self, config=config)
        packing = {key: getattr(self.config.data, key) for key in ("packing", "packed_length")}
        if config.data.model_copy(update=packing) == self.config.data:
            encoded = ("train", "validation", "unrelated")
            changed.__dict__.update({key: vars(self)[key] for key in encoded if key in vars(self)})
        return changed

    def encode(
        self, records: Any, *, bad: BadRecords | None = None, of: str = ""
    ) -> EncodedDataset:
        """Encode other records as those of the run are, and note what is not used of them.

        `of` ends each note. Raises UserError.
        """
        encoded = encode_records(
            records,
            self.format,
            self.config.data,
            vocab_size=self.table_rows,
            display=self.display,
            bad=bad,
            made_from=self.made_from,
        )
        for note in self.format.notes():
            self.display.note(note + of)
        return encoded


def with_template_date(config: RunConfig, day: date | None) -> RunConfig:
    """Return the config with the day that the chat template prints, unless it has one."""
    if config.data.template_date is not None or day is None:
        return config
    data = config.data.model_copy(update={"template_date": day})
    return config.model_copy(update={"data": data})


def read_material(
    config: RunConfig, display: Display, *, trained: tuple[Any, Any] | None = None
) -> Material:
    """Open the data, and make the tokenizer and the format that it is encoded with.

    `trained`: the model and the tokenizer of a finished run, instead of those of the config.
    Raises UserError for anything wrong with data, tokenizer, template, or the model's config.
    """
    raw = load_raw_data(config.data, seed=config.seed)
    if trained is not None:
        skeleton, tokenizer = trained
        tokens = ChatTokens()
    else:
        tokenizer = make_tokenizer(config.model, raw.texts())
        tokens = set_template(tokenizer, config.model.chat_template)
        if tokens.completed:
            display.note(
                "the chat template wrote no header where the assistant is to answer; it was added, "
                "and is saved with the model"
            )
        skeleton = load_skeleton(model_spec(config.model, tokenizer))
    if prints_the_date(tokenizer.chat_template):
        config = with_template_date(config, date.today())
    check_length(skeleton, config.data.max_length)
    format = make_format(config.data, tokenizer, raw.first_record)
    made_from = repr(
        [
            config.data.format,
            format_options(config.data),
            raw.first_record,
            said_of_tokenizer(tokenizer),
        ]
    )
    return Material(config, display, raw, tokenizer, tokens, skeleton, format, made_from)
