"""Languages by the names that people use: codes of two or three letters, NLLB's codes, names.

`langcodes` knows them all: "en", "eng", "eng_Latn", "pt-BR", "English", "Portuguese (Brazil)".
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache

from langcodes import Language, tag_is_valid
from language_data.names import TRIES, name_to_code, normalize_name

from finetune.errors import UserError

Languages = tuple[str | None, str | None]
"""The languages that a config names, source and target; None: found in the data."""

_ROLES = (("source", "target"), ("src", "tgt"), ("src", "trg"), ("input", "output"))
_MANY_SPEAKERS = 10_000_000
_ENGLISH = "en/name_to_language"
_NEAR, _SHORTEST = 0.88, 5  # how alike a misspelt name is, and its letters at least
_OF_TEXTS = re.compile(r"(?<=.)[\s_]+(texts?|sentences?|phrases?|translations?|language)$", re.I)
_VARIANT = re.compile(r"(.+?)\s*\((.+)\)")  # Portuguese (Brazil)


@cache
def is_language(text: str) -> bool:
    """Return whether a column or a file's ending of this name holds text of a language.

    Languages with less than ten million speakers and no code of two letters count only with a
    script or a region: "tag", "key" and "label" are languages too.
    """
    language = _find(text)
    if language is None:
        return False
    text = text.strip()
    if not tag_is_valid(text):  # a name
        return len(str(language.language)) == 2 or _has_many_speakers(language)
    code = Language.get(text)
    has_short_code = 2 in (len(text), len(str(code.language)))
    has_more = bool(language.script or language.territory)
    return has_short_code or has_more or _has_many_speakers(language)


def is_known_language(text: str) -> bool:
    """Return whether a text is the code or the name of any language, however few speak it."""
    return _find(text) is not None


def require_name(text: str, what: str) -> None:
    """Raise UserError unless a text can name a language: one line that is not blank."""
    if not text.strip() or text.splitlines() != [text]:
        raise UserError(
            f"{what} is {text!r:.80}, and a language is one line of text. Give its name or its "
            "code, such as fr"
        )


def require_language(text: str, what: str) -> None:
    """Raise UserError for a misspelt language, or for two small letters that are no code.

    Any other name of one line is taken as it is: it may be a language of its own, such as SQL.
    """
    require_name(text, what)
    if is_known_language(text):
        return
    name = normalize_name(text)
    names = [known for known in TRIES[_ENGLISH] if len(known) >= _SHORTEST]
    near = get_close_matches(name, names, n=5, cutoff=_NEAR) if len(name) >= _SHORTEST else []
    if meant := next(filter(is_language, near), None):
        raise UserError(f"{what} is {text!r}. Did you mean {language_name(meant)!r}?")
    if re.fullmatch("[a-z]{2}", text.strip()):
        raise UserError(f"{what} is {text!r}, which is the code of no language. Give its name")


def _has_many_speakers(language: Language) -> bool:
    return language.speaking_population() >= _MANY_SPEAKERS


@cache
def language_tag(text: str) -> str:
    """Return what is equal for two names of one language: "en" for "English", "eng", "eng_Latn".

    A name that is not known is returned as it is, in small letters.
    """
    language = _find(text)
    return text.lower() if language is None else str(_without_usual_script(language))


def base_language(text: str) -> str:
    """Return the tag of the language without its script and region: "pt" for "pt-BR"."""
    return language_tag(text).split("-")[0]


@cache
def script_of(text: str) -> str | None:
    """Return the script that the language is usually written in, such as "Latn", if known."""
    language = _find(text)
    return None if language is None else language.maximize().script


@cache
def language_name(text: str, *, full: bool = False) -> str:
    """Return the English name of a language, or `text` itself if it is unknown.

    The region is part of it, "Portuguese (Brazil)", and an unusual script, "Serbian (Latin)". With
    `full` the usual script is part of it too, "Serbian (Cyrillic)".
    """
    language = _find(text)
    if language is None:
        return text
    return (language if full else _without_usual_script(language)).display_name("en")


def language_columns(
    record: Iterable[str], columns: Mapping[str, str], languages: Languages
) -> dict[str, str]:
    """Return language -> the column with its text; those in `data.columns` are all, if any are.

    The column "id" is a number, and Indonesian only if that is one of the languages asked for.
    """
    given = {name: column for name, column in columns.items() if is_known_language(name)}
    indonesian = {language_tag(language) for language in languages if language} & {"id"}
    return given or {
        name: name
        for name in record
        if is_language(name) and (indonesian or name.strip().lower() != "id")
    }


def key_of_language(language: str, keys: Mapping[str, str]) -> str | None:
    """Return the key or column of a language, under whichever name of it; None if there is none."""
    if language in keys:
        return keys[language]
    found = [key for name, key in keys.items() if language_tag(name) == language_tag(language)]
    return found[0] if len(found) == 1 else None


def roles_in(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the keys of a pair that are named source and target, as "src" and "tgt" are.

    They name no languages, though "src" is the code of one. None if there are no such keys.
    """
    found = {key.lower(): key for key in keys}
    return next(((found[a], found[b]) for a, b in _ROLES if {a, b} <= found.keys()), None)


def sides_of_pair(
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
    sides = key_of_language(source, keys) or source, key_of_language(target, keys) or target
    if sides[0] == sides[1]:
        raise UserError(
            f"source and target language are both {sides[0]!r}. Set "
            "data.translation.source_language and target_language to two of the languages"
        )
    names = {language_name(language, full=True) for language in (source, target)}
    if len(names) == 1:
        raise UserError(
            f"{source!r} and {target!r} are two names of one language, {names.pop()}. Rename one "
            "of the columns, or set data.translation.source_language and target_language"
        )
    return sides, (source, target)


def _other(keys: Mapping[str, str], language: str | None) -> str:
    """Return the first language that is not `language`."""
    taken = None if language is None else key_of_language(language, keys)
    return next(name for name, key in keys.items() if key != taken)


def _find(text: str) -> Language | None:
    """Return the language of a code or a name, or None."""
    text = _OF_TEXTS.sub("", text.strip())
    if not text.isprintable():  # the names are looked up in C, which takes no NUL
        return None
    if tag_is_valid(text):
        return _plain(Language.get(text))
    variant = _VARIANT.fullmatch(text)
    code = _code_of(variant[1] if variant else text)
    if code is None:
        return None
    language = Language.get(code)
    if variant is None:
        return _plain(language)
    region = name_to_code("territory", variant[2], "en")
    script = name_to_code("script", variant[2], "en")
    if region is None and script is None:
        return None
    return _plain(Language.make(language=language.language, script=script, territory=region))


def _code_of(name: str) -> str | None:
    """Return the code of a language by its whole name, in English if it has one there.

    `name_to_code` takes a name's beginning for the name: "Personal" for "Pers", which is Persian.
    """
    for names in ("en", "und"):  # und: of any language
        code = name_to_code("language", name, names)
        if code is not None and normalize_name(name) in TRIES[f"{names}/name_to_language"]:
            return str(code)
    return None


def _plain(language: Language) -> Language | None:
    """Return language, script and region alone; None for codes that name no language."""
    if language.language in (None, "und", "mul", "mis", "zxx"):
        return None
    if len(language.language) == 3:
        language = language.prefer_macrolanguage()  # "arb" is "ar" for most people
    territory = None if language.territory in ("XX", "ZZ") else language.territory
    return Language.make(language=language.language, script=language.script, territory=territory)


def _without_usual_script(language: Language) -> Language:
    bare = Language.make(language=language.language, territory=language.territory)
    usual = bare.maximize().script
    is_usual = language.script == usual or (language.script, usual) == ("Hang", "Kore")
    return bare if is_usual else language


def is_other_way(asked: Sequence[str | None], names: Sequence[str]) -> bool:
    """Return whether of (source, target) one alone is asked for, and is the other of `names`."""
    given = [language_tag(language) for language in asked if language is not None]
    others = [language_tag(name) for name, own in zip(names[::-1], asked) if own is not None]
    return len(given) == 1 and given == others


def as_named(language: str, names: Sequence[str]) -> str:
    """Return the one of `names` that is the same language, or the one given."""
    same = [name for name in names if language_tag(name) == language_tag(language)]
    return same[0] if same else language
