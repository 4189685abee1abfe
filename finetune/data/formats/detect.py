"""The format of a dataset, recognised by the columns of its first record and built for it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from finetune.data.formats.chat import CHAT_OPTIONAL, CHAT_SHAPES, ChatFormat
from finetune.data.formats.control import ControlTokens
from finetune.data.formats.languages import is_language
from finetune.data.formats.rendering import TemplateSettings
from finetune.data.formats.text import TextFormat
from finetune.data.formats.translation import TranslationFormat
from finetune.data.types import Format, Record, Tokenizer
from finetune.errors import UserError, did_you_mean

SHAPES: dict[str, dict[str, Sequence[str]]] = {
    "chat": {**CHAT_SHAPES},
    "translation": {"translation": ["translation"], "sides": ["source", "target"]},
    "text": {"text": ["text"]},
}
"""Format -> shape -> the columns it needs. The order is the order of detection."""

_OPTIONAL = {"chat": CHAT_OPTIONAL, "translation": [], "text": []}
_ACCEPTED = (
    "messages; conversations; prompt and completion; instruction and output; translation; "
    "source and target; two columns named by languages (en, fr); text"
)


@dataclass(frozen=True)
class FormatOptions:
    """The wishes of a config about its format; each format reads the ones that concern it."""

    columns: Mapping[str, str]  # what the format calls a column -> what the data calls it
    targets: str  # chat and translation: "assistant" or "all"
    system_prompt: str | None  # chat and translation
    source_language: str | None  # translation, as the rest; None: found in the data
    target_language: str | None
    direction: str  # "forward", "backward" or "both"
    template: str | None
    settings: TemplateSettings  # chat and translation
    refuse_control_tokens: bool  # in the texts of records

    @property
    def languages(self) -> tuple[str | None, str | None]:
        return self.source_language, self.target_language


def build_format(
    kind: str, options: FormatOptions, *, tokenizer: Tokenizer, first_record: Record
) -> Format:
    """Return the format `kind`: "chat", "translation" or "text".

    For "auto" it is the one that fits the columns of `first_record`. Raises UserError if the
    columns of `first_record` fit no accepted shape.
    """
    _check_columns(options, first_record)
    control = ControlTokens(tokenizer, refuse=options.refuse_control_tokens)
    kind, shape = _detect(kind, first_record, options)
    if kind == "chat":
        chat = ChatFormat(
            tokenizer=tokenizer,
            shape=shape,
            columns=options.columns,
            targets=options.targets,
            system_prompt=options.system_prompt,
            settings=options.settings,
            control=control,
        )
        with suppress(UserError):  # said when the record is encoded
            chat.dialog(first_record)  # whether it calls tools
        return chat
    if kind == "text":
        return TextFormat(tokenizer=tokenizer, columns=options.columns, control=control)
    sides, languages = _pair(shape, first_record, options)
    in_one = shape == "translation"
    return TranslationFormat(
        tokenizer=tokenizer,
        languages=languages,
        direction=options.direction,
        template=options.template,
        targets=options.targets,
        system_prompt=options.system_prompt,
        pair_column=options.columns.get("translation", "translation") if in_one else None,
        sides=sides,
        settings=options.settings,
        control=control,
    )


def _detect(kind: str, record: Record, options: FormatOptions) -> tuple[str, str]:
    """Return the format and its shape."""
    columns = options.columns
    named = all(
        language is not None and columns.get(language, language) in record
        for language in options.languages
    )
    for candidate in SHAPES if kind == "auto" else [kind]:
        if candidate == "translation" and named:
            return candidate, "columns"
        for shape, needed in SHAPES[candidate].items():
            if all(columns.get(name, name) in record for name in needed):
                return candidate, shape
        if candidate == "translation" and len(_language_columns(record)) == 2:
            return candidate, "columns"
    accepted = (
        _ACCEPTED
        if kind == "auto"
        else "; or ".join(" and ".join(needed) for needed in SHAPES[kind].values())
    )
    if kind == "translation":
        accepted += "; or two columns named by languages (en, fr)"
    what = "no format fits" if kind == "auto" else f"the format {kind!r} does not fit"
    raise UserError(
        f"{what} the columns ({', '.join(record) or 'none'}); accepted are: {accepted}. If yours "
        "have other names, set data.columns, e.g. to {prompt: question, completion: answer}"
    )


def _pair(
    shape: str, record: Record, options: FormatOptions
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return the keys or columns of the two sides of a pair, and their languages."""
    columns, languages = options.columns, options.languages
    if shape == "sides":
        if languages[0] is None or languages[1] is None:
            raise UserError(
                "the columns do not show which languages they are in. Set "
                "data.translation.source_language and target_language, e.g. to en and fr"
            )
        sides = columns.get("source", "source"), columns.get("target", "target")
        return sides, (languages[0], languages[1])
    if shape == "translation":
        pair = record[columns.get("translation", "translation")]
        found = _languages(list(pair) if isinstance(pair, Mapping) else [], *languages)
        return found, found
    source, target = _languages(_language_columns(record), *languages)
    return (columns.get(source, source), columns.get(target, target)), (source, target)


def _language_columns(record: Record) -> list[str]:
    """Return the columns named by a language. The column "id" is a number, not Indonesian."""
    return [name for name in record if is_language(name) and name != "id"]


def _languages(keys: Sequence[str], source: str | None, target: str | None) -> tuple[str, str]:
    """Return the languages chosen by the user, completed by the data if that has exactly two."""
    if len(keys) == 2:
        source = source or next(key for key in keys if key != target)
        target = target or next(key for key in keys if key != source)
    if source is None or target is None:
        raise UserError(
            f"the languages of the pairs are not clear (found: {', '.join(keys) or 'none'}). Set "
            "data.translation.source_language and data.translation.target_language"
        )
    return source, target


def _check_columns(options: FormatOptions, record: Record) -> None:
    """Raise UserError for a name in `options.columns` that no format knows, or a missing column."""
    known = [
        name
        for kind, shapes in SHAPES.items()
        for needed in [*shapes.values(), _OPTIONAL[kind]]
        for name in needed
    ]
    known += [language for language in options.languages if language is not None]
    for name, given in options.columns.items():
        if name not in known:
            raise UserError(
                f"data.columns has the unknown name {name!r}; known are {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
        if given not in record:
            raise UserError(
                f"data.columns takes {name!r} from column {given!r}, which is missing; the columns "
                f"are {', '.join(record)}{did_you_mean(given, record)}"
            )
