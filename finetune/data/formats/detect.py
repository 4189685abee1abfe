"""The format of a dataset, recognised by the columns of its first record and built for it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches

from finetune.data.encoding.own import OwnFormat, Registered
from finetune.data.formats.chat import CHAT_OPTIONAL, CHAT_SHAPES, ChatFormat
from finetune.data.formats.columns import column, other_case, usual_columns
from finetune.data.formats.control import ControlTokens
from finetune.data.formats.languages import (
    Languages,
    is_known_language,
    key_of_language,
    language_columns,
    require_language,
    require_name,
    roles_in,
    sides_of_pair,
)
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
_NAMES = [
    name
    for kind, shapes in SHAPES.items()
    for needed in [*shapes.values(), _OPTIONAL[kind]]
    for name in needed
]
_SEPARATED = re.compile(r"\w+(?:([^\w \"'.-])\w+)+")  # a header such as question:answer
_ACCEPTED = (
    "messages; conversations; prompt and completion; question and answer; "
    "instruction and output; translation; "
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
    merge_turns: bool  # chat: turns of one role in a row become one

    @property
    def languages(self) -> Languages:
        return self.source_language, self.target_language


Builder = Callable[[Tokenizer, FormatOptions], Registered]


@dataclass(frozen=True)
class _Registered:
    build: Builder
    columns: Sequence[str]


_REGISTERED: dict[str, _Registered] = {}


def register_format(name: str, build: Builder, *, columns: Sequence[str]) -> None:
    """Add a format of one's own, for `data.format: NAME` and for `auto`.

    `build` makes it from the tokenizer and the wishes of the config. It is recognised by `columns`,
    before the formats that come with the package. Raises UserError if the name is taken, or if
    there are no columns.
    """
    if name in (*SHAPES, *_REGISTERED, "auto"):
        raise UserError(f"the format name {name!r} is taken. Choose another name")
    if not columns:
        raise UserError(f"the format {name!r} names no columns. Name those that it reads")
    _REGISTERED[name] = _Registered(build, tuple(columns))


def build_format(
    kind: str, options: FormatOptions, *, tokenizer: Tokenizer, first_record: Record
) -> Format:
    """Return the format `kind`: "chat", "translation", "text", or one that was registered.

    For "auto" it is the one that fits the columns of `first_record`. Raises UserError if the
    columns of `first_record` fit no accepted shape.
    """
    languages = options.languages
    kind, shape, columns = find_shape(
        kind, first_record, columns=options.columns, languages=languages
    )
    if kind in _REGISTERED:
        return OwnFormat(_REGISTERED[kind].build(tokenizer, options))
    control = ControlTokens(tokenizer, refuse=options.refuse_control_tokens)
    if kind != "translation":
        _require_no_translation(options, kind)
    if kind == "chat":
        chat = ChatFormat(
            tokenizer=tokenizer,
            shape=shape,
            columns=columns,
            given=options.columns,
            targets=options.targets,
            system_prompt=options.system_prompt,
            settings=options.settings,
            control=control,
            merge_turns=options.merge_turns,
        )
        with suppress(UserError):  # said when the record is encoded
            chat.dialog(first_record)  # whether it calls tools
        return chat
    if kind == "text" or not tokenizer.chat_template:
        _require_no_chat(options)
    if kind == "text":
        return TextFormat(tokenizer=tokenizer, columns=options.columns, control=control)
    sides, found = _pair(shape, first_record, columns, languages)
    in_one = shape == "translation"
    return TranslationFormat(
        tokenizer=tokenizer,
        languages=found,
        direction=options.direction,
        template=options.template,
        targets=options.targets,
        system_prompt=options.system_prompt,
        pair_column=columns.get("translation", "translation") if in_one else None,
        sides=sides,
        settings=options.settings,
        control=control,
    )


def _require_no_translation(options: FormatOptions, kind: str) -> None:
    """Raise UserError for a wish that only a translation can fulfil."""
    wishes = {
        "source_language (--from of `finetune init`)": options.source_language,
        "target_language (--to of `finetune init`)": options.target_language,
        "template": options.template,
        "direction": None if options.direction == "forward" else options.direction,
    }
    for name, value in wishes.items():
        if value is not None:
            raise UserError(
                f"data.translation.{name} is given, but this data is learnt as {kind}, by its "
                "columns or data.format. Leave it out, or name the columns of the pairs: "
                "data.columns={source: ..., target: ...}"
            )


def _require_no_chat(options: FormatOptions) -> None:
    """Raise UserError for a wish that only a conversation can fulfil."""
    wishes = {
        "system_prompt": options.system_prompt,
        "chat_template_kwargs": options.settings.options,
    }
    for name, value in wishes.items():
        if value:
            raise UserError(
                f"data.{name} is given, but this data is learnt as plain text, without a chat "
                f"template. Leave it out, or set model.chat_template"
            )


def find_shape(
    kind: str, record: Record, *, columns: Mapping[str, str], languages: Languages
) -> tuple[str, str, Mapping[str, str]]:
    """Return the format, its shape, and the columns that it reads by other names.

    The arguments are those of `build_format` and its options. Raises UserError if nothing fits.
    """
    known = ["auto", *SHAPES, *_REGISTERED]
    if kind not in known:
        near = did_you_mean(kind, known)
        raise UserError(f"data.format is {kind!r}; the formats are {', '.join(known)}{near}")
    for name, own in _REGISTERED.items():
        reads = all(columns.get(column, column) in record for column in own.columns)
        if kind == name and not reads:
            raise UserError(
                f"the format {name!r} does not fit the columns ({', '.join(record) or 'none'}); it "
                f"needs {' and '.join(own.columns)}. Set data.columns if yours have other names"
            )
        if reads and kind in ("auto", name):
            return name, name, columns
    _check_columns(columns, languages, record)
    found = _detect(kind, record, columns, languages)
    if found[0] == "translation":
        _pair(found[1], record, found[2], languages)
    _require_read(columns, record, *found)
    return found


def first_that_fits(
    records: Iterable[Record], kind: str, *, columns: Mapping[str, str], languages: Languages
) -> Record | None:
    """Return the first of the records that a format fits: one may be bad, and is said elsewhere.

    None without records. Raises UserError if no format fits any of them, about the first.
    """
    refused = None
    for record in records:
        try:
            find_shape(kind, record, columns=columns, languages=languages)
        except UserError as error:
            refused = refused or error
        else:
            return record
    if refused is not None:
        raise refused
    return None


def _detect(
    kind: str, record: Record, given: Mapping[str, str], languages: Languages
) -> tuple[str, str, Mapping[str, str]]:
    columns = {**other_case(record, _NAMES), **given}
    pairs = language_columns(record, columns, languages)
    named = all(language and key_of_language(language, pairs) for language in languages)
    usual = usual_columns(record) if kind in ("auto", "chat") else {}
    kinds = [*SHAPES] if kind == "auto" else [kind]
    if asked := _asked_for(kinds, record, given, columns, usual):
        return asked
    for candidate in kinds:
        if candidate == "translation" and named:
            return candidate, "columns", columns
        for shape, needed in SHAPES[candidate].items():
            if usual and candidate == "text":
                continue  # beside a question and its answer, "text" is a remark
            values = [record.get(columns.get(name, name)) for name in needed]
            if shape == "translation" and kind == "auto" and isinstance(values[0], str):
                continue  # the text of one side
            if all(columns.get(name, name) in record for name in needed):
                return candidate, shape, columns
        if candidate == "translation" and len(pairs) == 2 and not usual:
            return candidate, "columns", columns
    if usual:
        return "chat", next(iter(usual)), {**usual, **columns}
    accepted = (
        _ACCEPTED
        if kind == "auto"
        else "; or ".join(" and ".join(needed) for needed in SHAPES[kind].values())
    )
    if kind == "chat":
        accepted += "; or question and answer"
    if kind == "translation":
        accepted += "; or two columns named by languages (en, fr)"
    what = "no format fits" if kind == "auto" else f"the format {kind!r} does not fit"
    raise UserError(
        f"{what} the columns ({', '.join(record) or 'none'}); accepted are: {accepted}."
        f"{_hint(record, pairs)}"
    )


def _asked_for(
    kinds: Sequence[str],
    record: Record,
    given: Mapping[str, str],
    columns: Mapping[str, str],
    usual: Mapping[str, str],
) -> tuple[str, str, Mapping[str, str]] | None:
    """Return the shape for which `data.columns` names a column, if the record has the others.

    What is named comes before what is there under a format's own names.
    """
    for kind in kinds:
        for names in (columns, {**usual, **columns}) if kind == "chat" else (columns,):
            for shape, needed in SHAPES[kind].items():
                fits = all(names.get(name, name) in record for name in needed)
                if fits and not given.keys().isdisjoint(needed):
                    return kind, shape, names
        if (
            kind == "translation"
            and sum(is_known_language(name) for name in given if name not in _NAMES) == 2
        ):
            return kind, "columns", columns
    return None


def _require_read(
    given: Mapping[str, str], record: Record, kind: str, shape: str, columns: Mapping[str, str]
) -> None:
    """Raise UserError if `data.columns` names a column that the shape does not read."""
    if shape == "columns":
        return
    names = [*SHAPES[kind][shape], *_OPTIONAL[kind]]
    read = {columns.get(name, name) for name in names}
    for name, own in given.items():
        if own in record and own not in read:
            raise UserError(
                f"data.columns takes {name!r} from the column {own!r}, but the data is learnt as "
                f"{kind}, from {' and '.join(columns.get(n, n) for n in SHAPES[kind][shape])}. "
                f"Leave {name!r} out, or name the other columns of its format as well"
            )


def _hint(record: Record, pairs: Mapping[str, str]) -> str:
    """Return what to do if no format fits, as a sentence after a blank.

    `pairs`: language -> the column with its text.
    """
    if len(pairs) > 2 or (len(pairs) == 1 and "id" in map(str.lower, record)):
        why = "" if len(pairs) > 2 else ", if the column 'id' is Indonesian"
        return f" Set data.translation.source_language and target_language to two columns{why}"
    if len(record) == 1 and (found := _SEPARATED.fullmatch(next(iter(record)))):
        return (
            f" If the fields are separated by {found[1]!r}, save the file with commas, semicolons, "
            "tabs or bars instead"
        )
    known = sorted({name for shapes in SHAPES.values() for s in shapes.values() for name in s})
    if record and all(name[:1] == name[-1:] == '"' for name in record):
        return " If the file has its fields in quotation marks, name it .csv"
    for name in record:
        if len(name) > 40 or len(name.split()) > 4 or name.endswith((".", "?", "!", "…")):
            return " If the file has no header line, add one with the names of its columns"
        if name not in known and (near := get_close_matches(name, known, n=1, cutoff=0.8)):
            return f" Rename the column {name!r}, or set data.columns={{{near[0]}: {name}}}"
    if isinstance(record.get("translation"), str):
        return (
            " If 'translation' is the text of one language, set data.columns={source: ..., target: "
            "translation}, and data.translation.source_language and target_language"
        )
    plain = len(record) == 2 and all(re.fullmatch(r"\w+", name) for name in record)
    prompt, completion = record if plain else ("question", "answer")
    order = " (the question's column first)" if plain else ""
    return (
        f" If yours have other names, set data.columns, e.g. to {{prompt: {prompt}, completion: "
        f"{completion}}}{order}; a table needs a header line"
    )


def _pair(
    shape: str, record: Record, columns: Mapping[str, str], languages: Languages
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return the keys or columns of the two sides of a pair, and their languages."""
    _require_languages(record, columns, languages)
    pair = record[columns.get("translation", "translation")] if shape == "translation" else {}
    pair = pair if isinstance(pair, Mapping) else {}
    roles = roles_in(pair)
    if roles or shape == "sides":
        if languages[0] is None or languages[1] is None:
            raise UserError(
                f"the {'keys' if roles else 'columns'} do not show which languages they are in. "
                "Set data.translation.source_language and target_language, e.g. to en and fr. "
                "`finetune init` takes them as --from en --to fr"
            )
        sides = roles or (columns.get("source", "source"), columns.get("target", "target"))
        return sides, (languages[0], languages[1])
    if shape == "translation":
        keys = {key: key for key in pair if key in languages or is_known_language(key)}
    else:
        keys = language_columns(record, columns, languages)
    sides, found = sides_of_pair(keys, *languages)
    for side in sides if shape == "columns" else ():
        column(record, side, {})
    return sides, found


def _require_languages(record: Record, columns: Mapping[str, str], languages: Languages) -> None:
    """Raise UserError for a blank or a misspelt language. A name of the data itself is right."""
    pair = record.get(columns.get("translation", "translation"))
    names = {*columns, *record, *(pair if isinstance(pair, Mapping) else ())}
    for key, language in zip(("source_language", "target_language"), languages):
        if language is None:
            continue
        require_name(language, f"data.translation.{key}")
        if language not in names:
            require_language(language, f"data.translation.{key}")


def _check_columns(columns: Mapping[str, str], languages: Languages, record: Record) -> None:
    """Raise UserError for a name that no format knows, or a missing column that is not optional."""
    known = [*_NAMES, *(language for language in languages if language is not None)]
    optional = {name for names in _OPTIONAL.values() for name in names}  # a record may lack it
    for name, given in columns.items():
        if name not in known and not is_known_language(name):
            raise UserError(
                f"data.columns has the unknown name {name!r}; known are {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
        if given not in record and name not in optional:
            raise UserError(
                f"data.columns takes {name!r} from column {given!r}, which is missing; the columns "
                f"are {', '.join(record)}{did_you_mean(given, record)}"
            )
