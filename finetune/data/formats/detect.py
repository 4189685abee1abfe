"""Which format the rows are in, told from the columns of the first row, and the format built for it.

Floor 1.
"""

from collections.abc import Mapping, Sequence

from finetune.data.formats.chat import SHAPES as CHAT_SHAPES
from finetune.data.formats.chat import ChatFormat
from finetune.data.formats.languages import is_language
from finetune.data.formats.rendering import Tokenizer
from finetune.data.formats.text import TextFormat
from finetune.data.formats.translation import TranslationFormat
from finetune.data.types import Format, Row
from finetune.errors import UserError, did_you_mean

SHAPES: dict[str, dict[str, Sequence[str]]] = {
    "chat": {**CHAT_SHAPES},
    "translation": {"translation": ["translation"], "sides": ["source", "target"]},
    "text": {"text": ["text"]},
}
"""Format -> shape -> the columns it needs. The order is the order of detection."""

_OPTIONAL = {"chat": ["input"], "translation": [], "text": []}
_ACCEPTED = (
    "messages; conversations; prompt and completion; instruction and output; translation; source and target; two columns named by "
    "languages (en, fr); text"
)


def build_format(
    kind: str,
    *,
    tokenizer: Tokenizer,
    first_row: Row,
    columns: Mapping[str, str],
    targets: str,
    system_prompt: str | None,
    source_language: str | None,
    target_language: str | None,
    direction: str,
    template: str | None,
) -> Format:
    """The format named by `kind` ("chat", "translation", "text"), or the one that `first_row` is in ("auto").

    `columns`: what the format calls a column -> what the data calls it. Raises UserError where the columns fit no accepted shape.
    """
    _check_columns(columns, first_row, languages=(source_language, target_language))
    kind, shape = _detect(kind, first_row, columns, (source_language, target_language))
    if kind == "chat":
        return ChatFormat(
            tokenizer=tokenizer,
            shape=shape,
            columns=columns,
            targets=targets,
            system_prompt=system_prompt,
        )
    if kind == "text":
        return TextFormat(tokenizer=tokenizer, columns=columns)
    first, second, languages = _sides(shape, first_row, columns, (source_language, target_language))
    return TranslationFormat(
        tokenizer=tokenizer,
        languages=languages,
        sides=(first, second),
        pair_column=columns.get("translation", "translation") if shape == "translation" else None,
        direction=direction,
        template=template,
        targets=targets,
        system_prompt=system_prompt,
    )


def _detect(
    kind: str, row: Row, columns: Mapping[str, str], languages: tuple[str | None, str | None]
) -> tuple[str, str]:
    """Return the format and its shape."""
    named = all(
        language is not None and columns.get(language, language) in row for language in languages
    )
    for candidate in SHAPES if kind == "auto" else [kind]:
        if candidate == "translation" and named:
            return candidate, "columns"
        for shape, needed in SHAPES[candidate].items():
            if all(columns.get(name, name) in row for name in needed):
                return candidate, shape
        if candidate == "translation" and len(_language_columns(row)) == 2:
            return candidate, "columns"
    accepted = (
        _ACCEPTED
        if kind == "auto"
        else "; or ".join(" and ".join(needed) for needed in SHAPES[kind].values())
    )
    if kind == "translation":
        accepted += "; or two columns named by languages (en, fr)"
    what = "a format" if kind == "auto" else f"the format {kind!r}"
    raise UserError(
        f"{what} needs other columns than there are ({', '.join(row) or 'none'}); accepted are: {accepted}; data.columns gives "
        "columns other names, e.g. {prompt: question, completion: answer}"
    )


def _sides(
    shape: str, row: Row, columns: Mapping[str, str], languages: tuple[str | None, str | None]
) -> tuple[str, str, tuple[str, str]]:
    """Return where the source and the target of a pair are, and their languages."""
    if shape == "sides":
        if languages[0] is None or languages[1] is None:
            raise UserError(
                "the columns do not say what languages they are in; set data.translation.source_language and target_language, "
                "e.g. en and fr"
            )
        return (
            columns.get("source", "source"),
            columns.get("target", "target"),
            (languages[0], languages[1]),
        )
    if shape == "translation":
        pair = row[columns.get("translation", "translation")]
        source, target = _languages(list(pair) if isinstance(pair, Mapping) else [], *languages)
        return source, target, (source, target)
    source, target = _languages(_language_columns(row), *languages)
    return columns.get(source, source), columns.get(target, target), (source, target)


def _language_columns(row: Row) -> list[str]:
    """The columns named by a language; "id" is taken for a number rather than for Indonesian."""
    return [name for name in row if is_language(name) and name != "id"]


def _languages(keys: Sequence[str], source: str | None, target: str | None) -> tuple[str, str]:
    """The languages chosen by the user; of two that the data has, those not chosen follow."""
    if len(keys) == 2:
        source = source or next(key for key in keys if key != target)
        target = target or next(key for key in keys if key != source)
    if source is None or target is None:
        raise UserError(
            f"the languages of the pairs are not clear (there are {', '.join(keys) or 'none'}); set "
            "data.translation.source_language and data.translation.target_language"
        )
    return source, target


def _check_columns(
    columns: Mapping[str, str], row: Row, *, languages: tuple[str | None, str | None]
) -> None:
    """Raise UserError for a name in `columns` that no format knows, or a column that is not there."""
    known = [
        name
        for kind, shapes in SHAPES.items()
        for needed in [*shapes.values(), _OPTIONAL[kind]]
        for name in needed
    ]
    known += [language for language in languages if language is not None]
    for name, given in columns.items():
        if name not in known:
            raise UserError(
                f"data.columns has the unknown name {name!r}; known are {', '.join(known)}{did_you_mean(name, known)}"
            )
        if given not in row:
            raise UserError(
                f"data.columns takes {name!r} from column {given!r}, which is missing; the columns are {', '.join(row)}"
                f"{did_you_mean(given, row)}"
            )
