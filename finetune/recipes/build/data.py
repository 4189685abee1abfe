"""From the data section of a config to records, format and encoded examples."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from itertools import islice
from typing import Any

from finetune.config.schema import DataSection, RunConfig, SourceSection
from finetune.data.bad_records import BadRecords
from finetune.data.encode import EncodedDataset, NoTargets, encode
from finetune.data.encoding.kept import KeptEncoding
from finetune.data.encoding.own import OwnFormat
from finetune.data.encoding.store import EntryDraft, Store
from finetune.data.formats.chat import ChatFormat
from finetune.data.formats.detect import FormatOptions, build_format
from finetune.data.formats.languages import language_name
from finetune.data.formats.rendering import TemplateSettings
from finetune.data.formats.text import TextFormat
from finetune.data.formats.translation import TranslationFormat
from finetune.data.sources import (
    Records,
    RecordStream,
    Source,
    load_records,
    split_held_out,
    stream_records,
)
from finetune.data.sources.opening import data_files
from finetune.data.sources.peek import MOST_LOOKED_AT, require_plain_text
from finetune.data.sources.records import no_records
from finetune.data.types import Format, Prompt, Record
from finetune.display import Display
from finetune.errors import UserError
from finetune.evaluation.answers import TOOL_CALLS
from finetune.models.describe import context_length
from finetune.models.gguf import cache_dir
from finetune.recipes.build.look import typical_record

STREAM_SAMPLE = 1000  # records of a stream that are read in advance
ADVANCE = 1000  # records between two moves of the progress bar
TOKENIZER_RECORDS = 20_000  # a new tokenizer is trained on at most as many


@dataclass(frozen=True)
class RawData:
    """The records of a run, not yet tokenised."""

    train: Records | RecordStream
    validation: Records | None
    first_record: Record  # the first whose columns a format fits

    def texts(self) -> Iterator[str]:
        """Return every text in the first training records, for a new tokenizer.

        The tokenizer may read them in another thread.
        """
        records = islice(iter(self.train), TOKENIZER_RECORDS)
        return (text for _, record in records for text in texts_in(record))


def load_raw_data(config: DataSection, *, seed: int) -> RawData:
    """Open the sources, and hold data out.

    Raises UserError if a source cannot be read, or if too little is left to train on.
    """
    if config.streaming:
        if config.validation is None and config.validation_fraction != 0:
            raise UserError(
                "a stream cannot be split. Give data.validation, or set data.validation_fraction=0"
            )
        if config.drop_duplicates:
            raise UserError(
                "duplicates in a stream cannot be found. Set data.streaming or "
                "data.drop_duplicates to false"
            )
        sources, on_bad = _checked(config.train, config), config.on_bad_record
        stream = stream_records(sources, on_bad=on_bad)
        start = stream_records(sources, on_bad=on_bad)
        records = (record for _, record in islice(start, MOST_LOOKED_AT))
        if (first := typical_record(records, config)) is None:
            raise no_records(str(sources[0]), start.bad)
        return RawData(stream, _validation(config), first)
    train, validation = open_records(config.train, config), _validation(config)
    if validation is None and config.validation_fraction != 0:
        train, validation = split_held_out(
            train,
            fraction=config.validation_fraction,
            most=config.max_validation_records,
            seed=seed,
        )
    records = (train[i] for i in range(min(len(train), MOST_LOOKED_AT)))
    first = typical_record(records, config)
    assert first is not None
    return RawData(train, validation, first)


def _validation(config: DataSection) -> Records | None:
    if config.validation is None:
        return None
    return open_records(config.validation, config).take(config.max_validation_records)


def open_records(sections: Sequence[SourceSection], config: DataSection) -> Records:
    """Return the records of the sections, with bad lines handled as `config` says."""
    sources, store = _checked(sections, config), encoded_store(config)
    return load_records(sources, on_bad=config.on_bad_record, store=store)


def encoded_store(config: DataSection) -> Store | None:
    """Return where encoded data is kept from one run to the next, if the config wants it."""
    return Store(cache_dir() / "encoded") if config.cache else None


def _checked(sections: Sequence[SourceSection], config: DataSection) -> list[Source]:
    """Return the sources. Raises UserError for a table or JSON in a file of text.

    Not if the config says that it is text.
    """
    sources = as_sources(sections)
    for source in sources if config.format == "auto" else ():
        require_plain_text(data_files(source))
    return sources


def as_sources(sections: Sequence[SourceSection]) -> list[Source]:
    """Return what the data room opens."""
    return [Source(**section.model_dump()) for section in sections]


def template_settings(config: DataSection) -> TemplateSettings:
    """Return what the chat template of a run gets in training and evaluation."""
    day = config.template_date
    now = None if day is None else datetime.combine(day, time())
    return TemplateSettings(options=config.chat_template_kwargs, now=now)


def make_format(config: DataSection, tokenizer: Any, first_record: Record) -> Format:
    """Return the format that the config names, or that the first record is in.

    Raises UserError, also for texts that the format cannot split.
    """
    options = format_options(config)
    format = build_format(config.format, options, tokenizer=tokenizer, first_record=first_record)
    if config.overlong == "split" and format.name != "text":
        raise UserError(
            f"data.overlong is split, which is for plain text: of a {format.name} example only the "
            "start would have its question. Set it to truncate, drop or error"
        )
    return format


def format_options(config: DataSection) -> FormatOptions:
    """Return the wishes of a config about its format."""
    pair = config.translation
    return FormatOptions(
        columns=config.columns,
        targets=config.targets,
        system_prompt=config.system_prompt,
        source_language=pair.source_language,
        target_language=pair.target_language,
        direction=pair.direction,
        template=pair.template,
        settings=template_settings(config),
        refuse_control_tokens=config.control_tokens == "refuse",
        merge_turns=config.merge_turns,
    )


def format_in_words(format: Format) -> str:
    """Return the format's name; of translations also the languages, as the data may name others."""
    if not isinstance(format, TranslationFormat):
        return format.name
    return f"{format.name} ({' and '.join(map(language_name, format.languages))})"


def overlong_of(config: DataSection, format: Format) -> str:
    """Return what becomes of examples over data.max_length."""
    return config.overlong or ("split" if format.name == "text" else "truncate")


def encode_records(
    records: Records | RecordStream,
    format: Format,
    config: DataSection,
    *,
    vocab_size: int,
    display: Display | None = None,
    bad: BadRecords | None = None,
    made_from: str | None = None,
) -> EncodedDataset:
    """Encode all records, or the first STREAM_SAMPLE of a stream, and show the progress.

    `bad` has records of other data that are to be listed too. `made_from` is what the format was
    made from; with it the result is kept for later runs, or is that of an earlier one.
    """
    display = display or Display(enabled=False)
    if isinstance(records, RecordStream):
        count, records = STREAM_SAMPLE, records.fresh()
        bad = records.bad
    else:
        count, bad = len(records), copy.deepcopy(records.bad) if bad is None else bad
    store = encoded_store(config) if isinstance(records, Records) else None
    data = records.fingerprint() if isinstance(records, Records) and store is not None else None
    overlong = overlong_of(config, format)

    def run(draft: EntryDraft | None) -> EncodedDataset:
        with display.bar("encoding", count, unit="records") as advance:
            source = _watched(islice(records, count), advance)
            return encode(
                source,
                format,
                max_length=config.max_length,
                overlong=overlong,
                vocab_size=vocab_size,
                bad=bad,
                draft=draft,
            )

    if store is None or data is None or made_from is None or isinstance(format, OwnFormat):
        try:
            encoded = run(None)
        except NoTargets as error:
            if isinstance(records, Records):
                raise
            most = f"at most {STREAM_SAMPLE:,} records"
            raise UserError(f"the start of the stream, {most}: {error}") from error
    else:
        limits = config.max_length, overlong, vocab_size
        kept = KeptEncoding(store, format, bad, key_parts=(data, made_from, limits))
        encoded = kept.get(run, note=display.note)
    if bad.count:
        display.warn(f"dropped: {bad.sentence()} (data.on_bad_record)")
    return encoded


def _watched(
    records: Iterable[tuple[str, Record]], advance: Callable[[int], None]
) -> Iterator[tuple[str, Record]]:
    """Yield the records, and report every ADVANCE of them to `advance`."""
    for number, record in enumerate(records):
        if number and number % ADVANCE == 0:
            advance(ADVANCE)
        yield record


def unrelated_text(
    config: RunConfig, tokenizer: Any, vocab_size: int, display: Display
) -> EncodedDataset | None:
    """Return the plain text of `data.unrelated`, encoded: as many records as are held out.

    What is dropped or not used is noted. Raises UserError if it cannot be read.
    """
    data = config.data
    if data.unrelated is None:
        return None
    try:
        records = open_records(data.unrelated, data)
        format, bad = TextFormat(tokenizer=tokenizer, columns={}), copy.deepcopy(records.bad)
        encoded = encode(
            records.take(data.max_validation_records),
            format,
            max_length=data.max_length,
            overlong="truncate",
            vocab_size=vocab_size,
            bad=bad,
        )
    except UserError as error:
        raise UserError(f"data.unrelated, which is plain text: {error}") from error
    if bad.count:
        display.warn(f"dropped of data.unrelated: {bad.sentence()} (data.on_bad_record)")
    for note in format.notes():
        display.note(f"{note} of data.unrelated")
    return encoded


def first_prompts(
    records: Records | None,
    format: Format,
    count: int,
    *,
    model: Any,
    room: int,
    note: Callable[[str], None],
) -> list[Prompt]:
    """Return the prompts of the first held-out records, at most `count`.

    Prompts that leave the model less room than `room` tokens for an answer are passed over; `note`
    gets a sentence about them. So are bad records that are dropped; others raise UserError.
    """
    limit = context_length(model)
    prompts: list[Prompt] = []
    passed_over = 0
    for where, record in records or ():
        if len(prompts) >= count:
            break
        try:
            found = format.prompts(record)
        except UserError as error:
            if records is not None and records.bad.action == "drop":
                continue
            raise UserError(f"{where}: {error}") from error
        fitting = [
            prompt for prompt in found if limit is None or len(prompt.input_ids) + room <= limit
        ]
        passed_over += len(found) - len(fitting)
        prompts.extend(fitting)
    if passed_over:
        note(
            f"of the held-out prompts {passed_over} were passed over: they leave no room for an "
            f"answer of generation.max_new_tokens = {room} in the {limit} tokens that the model "
            "reads"
        )
    return prompts[:count]


def generation_metrics(config: RunConfig, format: Format) -> tuple[str, ...]:
    """Return the metrics over answers: those of the config, else those that suit the format.

    These are chrF and BLEU for translation, and calls for conversations that call tools. There are
    none if no answers are generated.
    """
    if config.evaluation.generate == 0:
        return ()
    if config.evaluation.metrics is not None:
        return config.evaluation.metrics
    if isinstance(format, ChatFormat):
        return (TOOL_CALLS,) if format.calls_tools else ()
    return ("chrf", "bleu") if format.name == "translation" else ()


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a record, or in a value of one."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)
