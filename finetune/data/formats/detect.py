"""The format of a dataset, recognised by the columns of its first record and built for it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches

from finetune.data.formats.chat import CHAT_OPTIONAL, CHAT_SHAPES, ChatFormat
from finetune.data.formats.control import ControlTokens
from finetune.data.formats.languages import is_language, language_tag
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
_ASKED = ("prompt", "instruction", "question", "query", "user", "human")
_ANSWERED = ("completion", "output", "answer", "response", "assistant", "reply")
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
    merge_turns: bool  # chat: turns of one role in a row become one

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
    kind, shape, columns = _detect(kind, first_record, options)
    if kind == "chat":
        chat = ChatFormat(
            tokenizer=tokenizer,
            shape=shape,
            columns=columns,
            targets=options.targets,
            system_prompt=options.system_prompt,
            settings=options.settings,
            control=control,
            merge_turns=options.merge_turns,
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


def _detect(
    kind: str, record: Record, options: FormatOptions
) -> tuple[str, str, Mapping[str, str]]:
    """Return the format, its shape, and the columns that it reads by other names."""
    columns = options.columns
    pairs = _language_columns(record, columns)
    named = all(
        language is not None and _key_of(language, pairs) is not None
        for language in options.languages
    )
    for candidate in SHAPES if kind == "auto" else [kind]:
        if candidate == "translation" and named:
            return candidate, "columns", columns
        for shape, needed in SHAPES[candidate].items():
            if all(columns.get(name, name) in record for name in needed):
                return candidate, shape, columns
        if candidate == "translation" and len(pairs) == 2:
            return candidate, "columns", columns
    usual = _usual_columns(record) if kind in ("auto", "chat") else {}
    if usual:
        return "chat", next(iter(usual)), {**usual, **columns}
    accepted = (
        _ACCEPTED
        if kind == "auto"
        else "; or ".join(" and ".join(needed) for needed in SHAPES[kind].values())
    )
    if kind == "translation":
        accepted += "; or two columns named by languages (en, fr)"
    what = "no format fits" if kind == "auto" else f"the format {kind!r} does not fit"
    raise UserError(
        f"{what} the columns ({', '.join(record) or 'none'}); accepted are: {accepted}."
        f"{_hint(record)}"
    )


def _hint(record: Record) -> str:
    """Return what to do if no format fits, as a sentence after a blank."""
    known = sorted({name for shapes in SHAPES.values() for s in shapes.values() for name in s})
    for name in record:
        if len(name) > 40 or len(name.split()) > 4:
            return " If the file has no header line, add one with the names of its columns"
        if name not in known and (near := get_close_matches(name, known, n=1, cutoff=0.8)):
            return f" Rename the column {name!r}, or set data.columns={{{near[0]}: {name}}}"
    return (
        " If yours have other names, set data.columns, e.g. to {prompt: question, completion: "
        "answer}"
    )


def _usual_columns(record: Record) -> dict[str, str]:
    """Return the chat's columns by the names that people use: {"prompt": "question", ...}.

    It is empty unless there is exactly one column with a question, and one with its answer.
    """
    names = {name.strip().lower(): name for name in record}
    asked, answered = _found(_ASKED, names), _found(_ANSWERED, names)
    context = _found(["input", "context"], names)
    if not asked:
        asked, context = _found(["input"], names), _found(["context"], names)
    if len(asked) != 1 or len(answered) != 1 or len(context) > 1:
        return {}
    if context:  # is written below the question
        return {"instruction": asked[0], "input": context[0], "output": answered[0]}
    return {"prompt": asked[0], "completion": answered[0]}


def _found(usual: Sequence[str], names: Mapping[str, str]) -> list[str]:
    return [names[name] for name in usual if name in names]


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
        keys = {key: key for key in pair} if isinstance(pair, Mapping) else {}
    else:
        keys = _language_columns(record, columns)
    return _sides(keys, *languages)


def _language_columns(record: Record, columns: Mapping[str, str]) -> dict[str, str]:
    """Return language -> the column with its text; those in `columns` are all, if there are any.

    The column "id" is a number, not Indonesian.
    """
    given = {name: column for name, column in columns.items() if is_language(name)}
    return given or {
        name: name for name in record if is_language(name) and name.strip().lower() != "id"
    }


def _key_of(language: str, keys: Mapping[str, str]) -> str | None:
    """Return the key or column of a language, under whichever name of it; None if there is none."""
    if language in keys:
        return keys[language]
    found = [key for name, key in keys.items() if language_tag(name) == language_tag(language)]
    return found[0] if len(found) == 1 else None


def _sides(
    keys: Mapping[str, str], source: str | None, target: str | None
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return (keys, languages) of the two sides: those of the user, completed by the data's.

    The data completes them if it has exactly two languages.
    """
    if len(keys) == 2:
        source = source or _other(keys, target)
        target = target or _other(keys, source)
    if source is None or target is None:
        raise UserError(
            f"the languages of the pairs are not clear (found: {', '.join(keys) or 'none'}). Set "
            "data.translation.source_language and data.translation.target_language"
        )
    sides = _key_of(source, keys) or source, _key_of(target, keys) or target
    if sides[0] == sides[1]:
        raise UserError(
            f"source and target language are both {sides[0]!r}. Set "
            "data.translation.source_language and target_language to two of the languages"
        )
    return sides, (source, target)


def _other(keys: Mapping[str, str], language: str | None) -> str:
    """Return the first language that is not `language`."""
    taken = None if language is None else _key_of(language, keys)
    return next(name for name, key in keys.items() if key != taken)


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
        if name not in known and not is_language(name):
            raise UserError(
                f"data.columns has the unknown name {name!r}; known are {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
        if given not in record:
            raise UserError(
                f"data.columns takes {name!r} from column {given!r}, which is missing; the columns "
                f"are {', '.join(record)}{did_you_mean(given, record)}"
            )
