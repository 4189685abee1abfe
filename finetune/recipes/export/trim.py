"""The trim of an export: which tokens are kept, what they cover, and the smaller model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.encode import EncodedDataset
from finetune.data.sources import Source, load_records
from finetune.data.sources.files import Lines, kind_of, local_files, open_bytes
from finetune.data.types import Tokenizer
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import token_tables
from finetune.models.trim.keep import bpe_of, frequent_tokens, needed_tokens, tokens_of_texts
from finetune.models.trim.model import trim_model
from finetune.models.trim.renumber import stated_ids
from finetune.models.trim.tokenizer import trim_tokenizer
from finetune.recipes.build.data import open_records, texts_in
from finetune.recipes.build.material import Material, read_material
from finetune.recipes.build.vocabulary import active_ids, kept_ids
from finetune.recipes.export.coverage import Coverage, measure_coverage
from finetune.recipes.export.source import ExportSource
from finetune.run.records import Vocabulary

ENOUGH = 0.995  # share of held-out tokens; below it a warning names the remedy
EVERY = 10  # of the texts of a model, one in so many is held out to measure the coverage
_LINES = 5000  # of a text file that are encoded at once
FEW_TEXTS = 20  # of so few texts none is held out


@dataclass(frozen=True, kw_only=True)
class TrimOptions:
    """What is kept besides the tokens of the run, and how much must be covered."""

    texts: Sequence[Path] = ()
    keep: Sequence[str] = ()  # tokens, ids, or texts whose tokens are meant
    frequent: int = 1000  # the most frequent tokens
    min_coverage: float | None = None  # below it nothing is written


@dataclass(frozen=True)
class _Corpus:
    """The tokens of a run or of texts, and examples that were held out of them."""

    used: set[int]
    known: set[int]  # the tokens that are known without the held-out examples
    held_out: Sequence[Sequence[int]]


def trim_source(source: ExportSource, options: TrimOptions, display: Display) -> ExportSource:
    """Return the source with the smaller model and tokenizer, and the card that says so.

    Raises UserError if the tokenizer cannot be trimmed, if nothing says which tokens are used, or
    if less of the held-out text is covered than was asked for.
    """
    tokenizer, rows = source.tokenizer, len(token_tables(source.model)[0])
    bpe = bpe_of(tokenizer)
    texts = [text for path in options.texts for text in _read(path)]
    if options.texts and not texts:
        raise UserError(
            f"there is no text in {', '.join(map(str, options.texts))}. Give other files"
        )
    always = needed_tokens(tokenizer, source.template_settings)
    always |= stated_ids(source.model.config.to_dict())
    always |= stated_ids(source.model.generation_config.to_dict())
    always |= frequent_tokens(bpe, options.frequent) | _named(tokenizer, options.keep)
    corpus = _corpus(source, texts, display)
    whole = tokens_of_texts(tokenizer, (text for path in options.texts for text in _whole(path)))
    trimmed = trim_tokenizer(tokenizer, corpus.used | whole | always, rows=rows)
    coverage = None
    if corpus.held_out:
        without = trimmed
        if not corpus.used | whole <= corpus.known:
            without = trim_tokenizer(tokenizer, corpus.known | always, rows=rows)
        coverage = measure_coverage(tokenizer, without, corpus.held_out)
    lines = [
        f"{len(trimmed.kept):,} of {rows:,} rows of the token table are kept, bit for bit.",
        _origin(source, options),
        *(coverage.lines() if coverage is not None else ["What they cover was not measured."]),
    ]
    for line in lines:
        display.say(line)
    _judge(coverage, options, display, is_model=source.run is None)
    smaller = trim_model(source.model, trimmed.kept)
    card = source.card.rstrip("\n") + "\n\n## Vocabulary\n\n"
    card += "\n".join(f"- {line}" for line in (*lines, ANOTHER_MODEL)) + "\n"
    return replace(source, model=smaller, tokenizer=trimmed.tokenizer, card=card)


ANOTHER_MODEL = (
    "This is another model than its base. Adapters, draft models and merges for the base do not "
    "fit it."
)


def _origin(source: ExportSource, options: TrimOptions) -> str:
    """Return where the kept tokens come from."""
    parts = [] if source.run is None else [f"those that the run {source.name} used"]
    parts += [f"those of {path}" for path in options.texts]
    parts += [f"those of {', '.join(map(repr, options.keep))}"] if options.keep else []
    parts += ["special and byte tokens", "those of the chat template"]
    parts += [f"the {options.frequent:,} most frequent ones"] if options.frequent else []
    return f"The kept tokens are {', '.join(parts)}, and what their merges need."


def _judge(
    coverage: Coverage | None, options: TrimOptions, display: Display, *, is_model: bool
) -> None:
    """Warn if little is covered. Raises UserError if it is less than was asked for."""
    if options.min_coverage is not None:
        if coverage is None:
            remedy = "Give more text with --text" if is_model else "Put the run's data back"
            raise UserError(
                "--min-coverage is given, and there is no held-out text to measure. "
                f"{remedy}, or leave out --min-coverage"
            )
        if coverage.share < options.min_coverage:
            raise UserError(
                f"{coverage.share:.2%} of the held-out tokens are kept, and --min-coverage asks "
                f"for {options.min_coverage:.2%}. Add text with --text, or raise --frequent"
            )
    if coverage is not None and coverage.share < ENOUGH:
        display.note(
            f"warning: only {coverage.share:.2%} of the held-out tokens are kept, so such text "
            "gets longer. Add text of its kind with --text, or raise --frequent"
        )


def _corpus(source: ExportSource, texts: Sequence[str], display: Display) -> _Corpus:
    tokenizer = source.tokenizer
    if source.run is None or source.config is None:
        if not texts:
            raise UserError(
                f"{source.name} is a model, not a run, so its used tokens are not known. Give "
                "text of your domain with --text FILE"
            )
        many = len(texts) >= FEW_TEXTS
        others = [text for number, text in enumerate(texts) if not many or number % EVERY]
        apart = texts[::EVERY] if many else []
        return _Corpus(
            tokens_of_texts(tokenizer, texts),
            tokens_of_texts(tokenizer, others),
            [_ids(tokenizer, text) for text in apart],
        )
    more = tokens_of_texts(tokenizer, texts)
    used = {*Vocabulary.read(source.run).used}
    config = source.config
    try:
        material = read_material(config, Display(enabled=False), trained=(source.model, tokenizer))
        known = active_ids(tokenizer, [material.train], config.vocabulary.keep)
        used = used or active_ids(tokenizer, material.corpora, config.vocabulary.keep)
        test = _test_data(material)
        held_out = material.validation if test is None else test
        known = known if test is None else used
    except UserError as error:
        if not used:
            raise
        display.note(f"the coverage of held-out text is not measured: {error}")
        return _Corpus(used | more, used | more, [])
    examples = [] if held_out is None else [example.input_ids for example in held_out]
    return _Corpus(used | more, known | more, examples)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _test_data(material: Material) -> EncodedDataset | None:
    data = material.config.data
    return None if data.test is None else material.encode(open_records(data.test, data))


def _read(path: Path) -> Iterator[str]:
    """Yield every text in the records of a file."""
    source = Source(str(path), None, "train", None, None, None, None)
    for _, record in load_records([source], on_bad="error"):
        yield from texts_in(record)


def _whole(path: Path) -> Iterator[str]:
    """Yield a text file as it is, with the ends of its lines; nothing for another kind of file."""
    for file in local_files(str(path)):
        if kind_of(file) == "text":
            with open_bytes(file) as stream:
                lines = Lines(file, stream)
                while block := "".join(islice(lines, _LINES)):
                    yield block


def _named(tokenizer: Any, names: Sequence[str]) -> set[int]:
    """Return the ids of tokens that are named, by their id, as they are written, or in a text."""
    vocabulary = tokenizer.get_vocab()
    return {
        token
        for name in names
        for token in (
            [vocabulary[name]]
            if name in vocabulary
            else kept_ids(tokenizer, [int(name) if name.isdecimal() else name], key="--keep")
        )
    }
