"""From the data section of a config to rows, format and encoded examples.

Floor 5.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from finetune.config.schema import DataSection, RunConfig, SourceSection
from finetune.data.encode import EncodedDataset, encode
from finetune.data.formats.detect import FormatOptions, build_format
from finetune.data.formats.text import TextFormat
from finetune.data.sources import (
    Records,
    RecordStream,
    Source,
    load_records,
    split_held_out,
    stream_records,
)
from finetune.data.types import Format, Prompt, Record
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import context_length

STREAM_SAMPLE = 1000  # rows that are read of a stream to look at it
ADVANCE = 1000  # rows that the bar moves by
TOKENIZER_ROWS = 20_000  # rows that a new tokenizer is trained on, at most


@dataclass(frozen=True)
class RawData:
    """The rows of a run, not yet tokenised."""

    train: Records | RecordStream
    validation: Records | None
    first_row: Record

    def texts(self) -> Iterator[str]:
        """Every text in the first training rows, for a new tokenizer, which may read them in another thread."""
        rows = islice(iter(self.train), TOKENIZER_ROWS)
        return (text for _, row in rows for text in _texts(row))


def load_raw_data(config: DataSection, *, seed: int) -> RawData:
    """Open the sources. Raises UserError where one cannot be read, or there is nothing to hold out."""
    if config.streaming:
        if config.validation is None and config.validation_fraction > 0:
            raise UserError(
                "a stream cannot be split: give data.validation, or set data.validation_fraction=0"
            )
        stream = stream_records(as_sources(config.train))
        first = next(iter(stream_records(as_sources(config.train))), None)
        if first is None:
            raise UserError(f"{config.train[0].path} is empty: there are no rows in it")
        return RawData(stream, _validation(config), first[1])
    rows, validation = load_records(as_sources(config.train)), _validation(config)
    if validation is None and config.validation_fraction > 0:
        rows, validation = split_held_out(rows, fraction=config.validation_fraction, seed=seed)
        validation = validation.take(config.max_validation_records)
    return RawData(rows, validation, rows[0])


def _validation(config: DataSection) -> Records | None:
    return (
        None
        if config.validation is None
        else load_records(as_sources(config.validation)).take(config.max_validation_records)
    )


def as_sources(sections: Sequence[SourceSection]) -> list[Source]:
    return [Source(**section.model_dump()) for section in sections]


def make_format(config: DataSection, tokenizer: Any, first_row: Record) -> Format:
    """The format that the config names, or that the first row is in."""
    pair = config.translation
    options = FormatOptions(
        columns=config.columns,
        targets=config.targets,
        system_prompt=config.system_prompt,
        source_language=pair.source_language,
        target_language=pair.target_language,
        direction=pair.direction,
        template=pair.template,
    )
    return build_format(config.format, options, tokenizer=tokenizer, first_record=first_row)


def encode_rows(
    rows: Records | RecordStream,
    format: Format,
    config: DataSection,
    *,
    vocab_size: int,
    display: Display | None = None,
) -> EncodedDataset:
    """All rows, or the first STREAM_SAMPLE of a stream; `display` shows how far it is."""
    count = STREAM_SAMPLE if isinstance(rows, RecordStream) else len(rows)
    with (display or Display(enabled=False)).bar("encoding", count, unit="rows") as advance:
        return encode(
            _watched(islice(rows, count), advance),
            format,
            max_length=config.max_length,
            overlong=config.overlong,
            vocab_size=vocab_size,
        )


def _watched(
    rows: Iterable[tuple[str, Record]], advance: Callable[[int], None]
) -> Iterator[tuple[str, Record]]:
    """The rows, telling `advance` whenever ADVANCE of them have been read."""
    for number, row in enumerate(rows):
        if number and number % ADVANCE == 0:
            advance(ADVANCE)
        yield row


def unrelated_text(config: RunConfig, tokenizer: Any, vocab_size: int) -> EncodedDataset | None:
    """The plain text of `data.unrelated`, encoded, as much of it as of the held-out data."""
    data = config.data
    if data.unrelated is None:
        return None
    try:
        rows = load_records(as_sources(data.unrelated)).take(data.max_validation_records)
        format = TextFormat(tokenizer=tokenizer, columns={})
        return encode(
            rows, format, max_length=data.max_length, overlong="truncate", vocab_size=vocab_size
        )
    except UserError as error:
        raise UserError(f"data.unrelated, which is plain text: {error}") from error


def first_prompts(
    rows: Records | None,
    format: Format,
    count: int,
    *,
    model: Any,
    room: int,
    note: Callable[[str], None],
) -> list[Prompt]:
    """What to generate from: the prompts of the first held-out rows that leave the model room for an answer of `room` tokens."""
    limit = context_length(model)
    prompts: list[Prompt] = []
    passed_over = 0
    for where, row in rows or ():
        if len(prompts) >= count:
            break
        try:
            found = format.prompts(row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        fitting = [
            prompt for prompt in found if limit is None or len(prompt.input_ids) + room <= limit
        ]
        passed_over += len(found) - len(fitting)
        prompts.extend(fitting)
    if passed_over:
        note(
            f"of the held-out prompts {passed_over} were passed over: they leave no room for an answer of "
            f"generation.max_new_tokens = {room} in the {limit} tokens that the model reads"
        )
    return prompts[:count]


def generation_metrics(config: RunConfig, format: Format) -> tuple[str, ...]:
    """The metrics over generated text: those asked for, else both for translation and none for the rest; none of no answers."""
    if config.evaluation.generate == 0:
        return ()
    if config.evaluation.metrics is not None:
        return config.evaluation.metrics
    return ("chrf", "bleu") if format.name == "translation" else ()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
