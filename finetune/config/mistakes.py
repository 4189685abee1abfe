"""What is said of a mistake in a config: the key, the value, and what is allowed."""

import typing
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from finetune.config.other_tools import ALIASES, NOT_ALIASES
from finetune.config.places import field_of, keys_at, section_of
from finetune.config.schema import RunConfig
from finetune.errors import did_you_mean

NOT_ALLOWED = " is not allowed: "
SHOULD_BE = "input should be "  # pydantic's words
_FORMS = {  # section -> the key that a plain value is meant for
    "model": "name",
    "data": "train",
    "optimizer": "name",
    "scheduler": "name",
    "lora": "rank",
}
_MOST = 12  # mistakes that are told at once
_KINDS = ("int", "float", "str", "bool")  # of value, as pydantic names the one that it tried
_OUT_OF_RANGE = {
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"),
    "int_parsing_size",
}


def sentences_of(errors: Iterable[Any]) -> list[str]:
    """Return one for each key: pydantic has a problem with each kind of value that is allowed."""
    reasons: dict[str, list[str]] = {}
    for problem in errors:
        what, _, why = _sentence(problem).partition(NOT_ALLOWED)
        whys = reasons.setdefault(what, [])
        whys.append(why.removeprefix(SHOULD_BE) if whys else why)
    return [
        what + (NOT_ALLOWED + " or ".join(whys) if whys[0] else "")
        for what, whys in reasons.items()
    ]


def told(sentences: Sequence[str]) -> str:
    """Return the sentences as one text, and how many more there are than a reader takes in."""
    more = len(sentences) - _MOST
    return ". ".join([*sentences[:_MOST], *([f"There are {more:,} more mistakes"] * (more > 0))])


def _sentence(problem: Any) -> str:
    *above, last = problem["loc"] or ("",)
    path = [str(part) for part in above if not (isinstance(part, str) and "[" in part)]
    if problem["type"] == "extra_forbidden" or "[" not in str(last):  # else pydantic's own
        path += [str(last)] if last != "" else []
    if path and path[-1].removeprefix("constrained-") in _KINDS:
        path.pop()
    key, given = ".".join(path) or "config", problem["input"]
    if problem["type"] == "extra_forbidden":
        return unknown_key(key, path[-1], keys_at(path[:-1]))
    if problem["type"] == "missing":
        return f"{key!r} is missing and has no default. Add it"
    if problem["type"] == "value_error" and not problem["msg"].endswith(f"{SHOULD_BE}a number"):
        return str(problem["ctx"]["error"])
    if given is None and ":" in path[-1]:
        return _glued(key, path[-1])
    is_plain = isinstance(given, str | int | float | bool) or given is None
    shown = repr(given) if is_plain else kind_in_words(given)
    if problem["type"] == "model_type":
        why = SHOULD_BE + "a mapping of keys to values"
        if isinstance(given, str | int) and path[-1] in _FORMS and not isinstance(given, bool):
            why += f". Write {key}: {{{_FORMS[path[-1]]}: {given}}}"
        elif isinstance(given, bool) and path[-1] == "lora":
            why += f". Write {key}: {'{rank: 16}' if given else 'null'}"
    elif problem["type"] == "dict_type":
        why = SHOULD_BE + "a mapping, such as {name: value}"
    elif problem["type"] == "path_type":
        why = SHOULD_BE + "a path, in quotation marks if it is a number"
    elif (allowed := _range(path)) and problem["type"] in _OUT_OF_RANGE:
        why = SHOULD_BE + allowed
    elif problem["type"] == "tuple_type":
        why = SHOULD_BE + f"a list, such as [{'' if given in (None, 'None') else given}]"
    else:
        said = problem["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
        why = said[0].lower() + said[1:]
    return f"{key} = {shown}{NOT_ALLOWED}{why}"


def _range(path: Sequence[str]) -> str:
    """Return what numbers a key takes: "greater than 0 and at most 1,000"."""
    field = field_of(".".join(part for part in path if not part.isdigit()))
    words = {Gt: "greater than", Ge: "at least", Lt: "less than", Le: "at most"}
    pending, found = [field], []
    while pending:
        item = pending.pop()
        pending += [
            *getattr(item, "metadata", ()),
            *typing.get_args(getattr(item, "annotation", item)),
        ]
        for kind, word in words.items():
            if isinstance(item, kind):
                limit = getattr(item, kind.__name__.lower())
                found.append((limit, f"{word} {limit:,}"))
    return " and ".join(text for _, text in sorted(found))


def _glued(key: str, leaf: str) -> str:
    return f"{key!r} has no blank behind its colon. Write {leaf.replace(':', ': ', 1)}"


def key_of_option(option: str) -> str:
    """Return the keys that may be meant by an option such as --lr, in words; "" for none."""
    name = option.lstrip("-").replace("-", "_")
    name = ALIASES.get(name, name)
    return name if field_of(name) is not None else " or ".join(_places(name)[:3])


def unknown_key(key: str, leaf: str, known: Sequence[str]) -> str:
    """Return the sentence for a key that is none; `leaf` is its last part."""
    if ":" in str(leaf):
        return _glued(key, leaf)
    listed, bracket, _ = str(key).rpartition("[")
    if bracket and listed.rpartition(".")[2] in known:
        return f"{key!r} is not a key. Write the list whole: {listed}=[{{...}}, ...]"
    if leaf in NOT_ALIASES:
        return f"{key!r} is not a key here. {NOT_ALIASES[leaf]}"
    if 0 < len(places := _places(str(leaf))) <= 3:
        return f"{key!r} is not a key here. Write {' or '.join(places)}"
    if leaf in ALIASES:
        return f"{key!r} is not a key here. Write {ALIASES[leaf]}"
    near = did_you_mean(str(leaf), [*known, *ALIASES])
    there = "" if key == leaf else " there"
    return f"{key!r} is not a key; the keys{there} are {', '.join(known)}{near}"


def _places(leaf: str, model: type[BaseModel] = RunConfig, above: str = "") -> list[str]:
    """Return the dotted keys, anywhere in the config, whose last part is `leaf`."""
    found = [above + leaf] if leaf in model.model_fields else []
    for key in model.model_fields:
        if section := section_of(model, key):
            found += _places(leaf, section, f"{above}{key}.")
    return found


def yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}{place}"


def kind_in_words(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {
        dict: "a mapping",
        list: "a list",
        tuple: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    return names.get(type(value), type(value).__name__)
