"""The way from a YAML file and `key=value` overrides to a RunConfig.

Each mistake becomes a UserError that names the place, the value and what is allowed.
"""

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError

from finetune.config.other_tools import ALIASES, NOT_ALIASES
from finetune.config.schema import DataSection, RunConfig
from finetune.config.yaml12 import parse
from finetune.errors import UserError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)

NOT_ALLOWED = " is not allowed: "
SHOULD_BE = "input should be "  # pydantic's words
_FORMS = {"model": "name", "data": "train"}  # section -> the key that its text is meant for
_OUT_OF_RANGE = {
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"),
    "int_parsing_size",
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config in the YAML file at `path` with `a.b=value` overrides, validated.

    Without `output_dir` the run goes to `runs/<name of the file>`. Raises UserError.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder. Give a YAML file; a run's folder has one, {path / 'config.yaml'}"
        )
    if not path.is_file():
        raise UserError(
            f"the config {path} does not exist (looked in {path.parent.resolve()}). "
            "Give the path of a YAML file"
        )
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"the config {path} is not UTF-8 text ({error.reason} at byte {error.start}). "
            "Save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"the config {path} is not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"the config {path} holds {_kind(tree)}, but must be a YAML mapping. "
            "Write lines of the form `key: value`"
        )
    tree.setdefault("output_dir", str(Path("runs") / path.stem))
    return make_config(tree, overrides, where=str(path))


def make_config(
    tree: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "config"
) -> RunConfig:
    """Return the config that a tree from YAML describes. `where` opens the error message.

    Top-level keys that begin with x- or a dot hold what is merged elsewhere, and are left out.
    Raises UserError with a sentence for each mistake.
    """
    problems: list[str] = []
    tree = {key: value for key, value in tree.items() if not str(key).startswith(("x-", "."))}
    resolved = _resolve_aliases(tree, problems)
    for override in overrides:
        try:
            _apply(resolved, override)
        except UserError as error:
            problems.append(str(error))
    try:
        config = RunConfig.model_validate(resolved)
    except ValidationError as error:
        found: list[Any] = error.errors(include_url=False)
        # A key that is missing may be what a wrong one was meant for.
        problems += _sentences(p for p in found if not problems or p["type"] != "missing")
    if problems:
        raise UserError(f"{where}: " + ". ".join(problems))
    return config


def validate(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Return `values` as a `model`. `where` opens the error message. Raises UserError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(
            f"{where}: " + ". ".join(_sentences(error.errors(include_url=False)))
        ) from error


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML, which `load_config` reads back to an equal one."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
    )


def _resolve_aliases(tree: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the tree with other tools' names moved to ours, and note what is no key.

    A name that is ours in its own place is left alone.
    """
    resolved: dict[str, Any] = {}
    moved: list[tuple[str, str, Any]] = []  # the name given, where it is, the value
    for key, value in tree.items():
        section = _section(RunConfig, key)
        if section is None and key not in RunConfig.model_fields:
            moved.append((key, "", value))
        elif section is not None and isinstance(value, Mapping):
            resolved[key] = {n: item for n, item in value.items() if _takes(section, n)}
            moved += [(n, key, item) for n, item in value.items() if not _takes(section, n)]
        else:
            resolved[key] = value
    for name, place, value in moved:
        try:
            target, value = _alias(name, value, [place] if place else [])
            _set(resolved, target, value, given=f"{place}.{name}" if place else name)
        except UserError as error:
            problems.append(f"{place}: {error}" if place else str(error))
    return resolved


def _takes(section: type[BaseModel], name: str) -> bool:
    is_open = section.model_config.get("extra") == "allow"
    return name in section.model_fields or (is_open and name not in ALIASES)


def _alias(key: str, value: Any, place: Sequence[str]) -> tuple[str, Any]:
    """Return our key and the value for another tool's `key`. Raises UserError for any other."""
    if key not in ALIASES:
        raise UserError(_unknown(key, key, _keys_at(place)))
    if key == "report_to":
        value = [] if value in ("none", None) else [value] if isinstance(value, str) else value
    return ALIASES[key], value


def _unknown(key: str, leaf: str, known: Sequence[str]) -> str:
    """Return the sentence for a key that is none; `leaf` is its last part."""
    if leaf in NOT_ALIASES:
        return f"{key!r} is not a key here. {NOT_ALIASES[leaf]}"
    if 0 < len(places := _places(str(leaf))) <= 3:
        return f"{key!r} is not a key here. Write {' or '.join(places)}"
    near = did_you_mean(str(leaf), [*known, *ALIASES])
    there = "" if key == leaf else " there"
    return f"{key!r} is not a key; the keys{there} are {', '.join(known)}{near}"


def _places(leaf: str, model: type[BaseModel] = RunConfig, above: str = "") -> list[str]:
    """Return the dotted keys, anywhere in the config, whose last part is `leaf`."""
    found = [above + leaf] if leaf in model.model_fields else []
    for key in model.model_fields:
        if section := _section(model, key):
            found += _places(leaf, section, f"{above}{key}.")
    return found


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key:
        raise UserError(
            f"the override {override!r} is not of the form key=value. Write e.g. training.epochs=1"
        )
    leaf = key.rpartition(".")[2]
    is_alias = (leaf in ALIASES or leaf in NOT_ALIASES) and _field(key) is None
    target = ALIASES.get(leaf, key) if is_alias else key
    try:
        value = _read(target, text)
    except yaml.YAMLError as error:
        raise UserError(
            f"the value of the override {override!r} is not valid YAML: {_yaml_problem(error)}"
        ) from error
    if is_alias:
        target, value = _alias(leaf, value, [])
    _set(tree, target, value, given=None)


def _read(key: str, text: str) -> Any:
    """Return the value of an override: the text as it is for a key that takes text.

    A text that is in quotation marks as a whole is read as YAML, and so is null for a key that may
    have no value. A key that also takes lists or mappings takes them in brackets.
    """
    kinds = _kinds(key)
    if not kinds & {str, Path}:
        return parse(text)
    is_text = kinds <= {str, Path, type(None)}
    if type(None) in kinds and text.strip() in ("", "~", "null"):
        return None
    try:
        value = parse(text)
    except yaml.YAMLError:
        if not is_text and text.lstrip().startswith(("[", "{")):
            raise
        return text
    is_quoted = isinstance(value, str) and text.strip()[:1] in ("'", '"')
    is_other = not isinstance(value, str | dict) or text.lstrip().startswith("{")
    return value if is_quoted or (is_other and not is_text) else text


def _kinds(key: str) -> set[Any]:
    """Return the types of value that the key takes."""
    parent = _field(key.rpartition(".")[0])
    if parent is not None and parent.annotation == dict[str, str]:
        return {str}
    field = _field(key)
    if field is None:
        return set()
    if _item_section(DataSection, key.removeprefix("data.")):
        return {str, list}  # the sources of data
    is_union = typing.get_origin(field.annotation) in (types.UnionType, typing.Union)
    kinds = typing.get_args(field.annotation) if is_union else (field.annotation,)
    return {getattr(kind, "__origin__", kind) for kind in kinds}  # of Annotated[str, ...]: str


def _set(tree: dict[str, Any], dotted: str, value: Any, *, given: str | None) -> None:
    *parents, leaf = dotted.split(".")
    for depth, parent in enumerate(parents):
        below = tree.setdefault(parent, {})
        if below is None:
            below = tree[parent] = {}
        if not isinstance(below, dict):
            raise UserError(
                f"{dotted} cannot be set: {'.'.join(parents[: depth + 1])} is {_kind(below)}, "
                "not a section"
            )
        tree = below
    if given is not None and leaf in tree:
        raise UserError(f"{given!r} and {dotted!r} mean the same. Give one of them")
    tree[leaf] = value


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the section's class if `key` of `model` is a section, also an optional one."""
    field = model.model_fields.get(key)
    if field is None:
        return None
    members = (
        typing.get_args(field.annotation)
        if isinstance(field.annotation, types.UnionType)
        else (field.annotation,)
    )
    return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)


def _field(dotted: str) -> Any:
    """Return the schema's field at a dotted key, or None."""
    model: type[BaseModel] | None = RunConfig
    field = None
    for part in dotted.split("."):
        if model is None or part not in model.model_fields:
            return None
        field, model = model.model_fields[part], _section(model, part)
    return field


def _sentences(errors: Iterable[Any]) -> list[str]:
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


def _sentence(problem: Any) -> str:
    path = [str(part) for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    if path and path[-1] in ("int", "str"):  # the kind of value that was tried
        path.pop()
    key, given = ".".join(path) or "config", problem["input"]
    if problem["type"] == "extra_forbidden":
        return _unknown(key, path[-1], _keys_at(path[:-1]))
    if problem["type"] == "missing":
        return f"{key!r} is missing and has no default. Add it"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    is_plain = isinstance(given, str | int | float | bool) or given is None
    shown = repr(given) if is_plain else _kind(given)
    if problem["type"] == "model_type":
        why = SHOULD_BE + "a mapping of keys to values"
        if isinstance(given, str) and path[-1] in _FORMS:
            why += f". Write {key}: {{{_FORMS[path[-1]]}: {given}}}"
    elif problem["type"] == "path_type":
        why = SHOULD_BE + "a path, in quotation marks if it is a number"
    elif (allowed := _range(path)) and problem["type"] in _OUT_OF_RANGE:
        why = SHOULD_BE + allowed
    elif problem["type"] == "tuple_type":
        why = SHOULD_BE + f"a list, such as [{'' if given is None else given}]"
    else:
        why = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{key} = {shown}{NOT_ALLOWED}{why}"


def _range(path: Sequence[str]) -> str:
    """Return what numbers a key takes: "greater than 0 and at most 1,000"."""
    field = _field(".".join(part for part in path if not part.isdigit()))
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


def _keys_at(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in path:
        if part.isdigit():
            continue
        found = _section(model, part) or _item_section(model, part)
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _item_section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the class of the items if `key` holds a list of sections (data.train)."""
    field = model.model_fields.get(key)
    pending: list[Any] = [field.annotation] if field is not None else []
    while pending:
        item = pending.pop()
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
        pending.extend(typing.get_args(item))
    return None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}{place}"


def _kind(value: Any) -> str:
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
