"""The way from a YAML file and `key=value` overrides to a RunConfig.

Each mistake becomes a UserError that names the place, the value and what is allowed.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from finetune.config.mistakes import (
    kind_in_words,
    sentences_of,
    told,
    unknown_key,
    yaml_problem,
)
from finetune.config.other_tools import ABOUT_TRAINING, ALIASES, ELSEWHERE, NOT_ALIASES
from finetune.config.places import field_of, item_section_of, keys_at, section_of
from finetune.config.schema import DataSection, RunConfig
from finetune.config.yaml12 import dump, parse
from finetune.errors import UserError
from finetune.run.folder import RunDir, as_path, is_written_by_a_run
from finetune.run.given import own_copy

Model = TypeVar("Model", bound=BaseModel)
_DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".bz2", ".xz")


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config in the YAML file at `path` with `a.b=value` overrides, validated.

    Without `output_dir` the run goes to `runs/<name of the file>`. The config in a run's folder may
    come from anyone, so it cannot have a model's code run: only an override can. Raises UserError.
    """
    tree = read_tree(path)
    config = make_config(tree, overrides, where=str(path))
    if (
        config.model.trust_remote_code
        and is_written_by_a_run(Path(path))
        and not make_config(_without_trust(tree), overrides).model.trust_remote_code
    ):
        raise UserError(
            f"{path} asks to run the code that comes with the model, and a run's folder is not "
            "trusted with that. If you trust that code, add --trust-remote-code, or "
            "model.trust_remote_code=true to a command that takes a config"
        )
    return config


def _without_trust(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of a config, without what it says about a model's code."""
    model = {key: value for key, value in tree["model"].items() if key != "trust_remote_code"}
    rest = {key: value for key, value in tree.items() if key != "trust_remote_code"}
    return {**rest, "model": model}


def read_tree(path: str | PathLike[str]) -> dict[str, Any]:
    """Return the YAML file at `path` as a tree, with `output_dir`. Raises UserError."""
    path = as_path(path, "a YAML file")
    if path.is_dir():
        own = path / "config.yaml"
        has = f"; this run's folder has one, {own}" if own.is_file() else ""
        raise UserError(f"{path} is a folder. Give a YAML file{has}")
    if not path.is_file():
        raise UserError(
            f"the config {path} does not exist (looked in {path.parent.resolve()}). "
            "Give the path of a YAML file"
        )
    if path.suffix.lower() in _DATA:
        raise UserError(
            f"{path} is data, and a config is needed. `finetune init {quote(str(path))}` writes one"
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
        raise UserError(f"the config {path} is not valid YAML: {yaml_problem(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"the config {path} holds {kind_in_words(tree)}, but must be a YAML mapping. "
            "Write lines of the form `key: value`"
        )
    tree.setdefault("output_dir", str(Path("runs") / path.stem))
    run = RunDir(path.parent)
    return _where_it_is(tree, run) if path == run.config and _is_run(run) else tree


def _is_run(run: RunDir) -> bool:
    """Return whether a run was begun in the folder. A damaged marker is named later."""
    try:
        return run.is_run()
    except UserError:
        return False


def _where_it_is(tree: dict[str, Any], run: RunDir) -> dict[str, Any]:
    """Return the config of a run in the place where the run is now: it may have been moved.

    Data that was given in memory lies in the run's folder. The new place is not overwritten on the
    word of the old config.
    """
    place, data = tree["output_dir"], tree.get("data")
    if isinstance(place, str) and not _is_same(Path(place), run.root):
        tree = {**tree, "output_dir": str(run.root), "overwrite_output_dir": False}
    if not isinstance(data, dict):
        return tree

    def moved(source: Any) -> Any:
        if isinstance(source, list):
            return [moved(each) for each in source]
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            return {**source, "path": moved(source["path"])}
        own = own_copy(run, source) if isinstance(source, str) else None
        if own is None or (not own.is_absolute() and _is_same(Path(source), own)):
            return source
        return str(own)

    sources = {key: moved(data[key]) for key in ("train", "validation", "test") if key in data}
    return {**tree, "data": {**data, **sources}}


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two paths name one file or folder that is there."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


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
    _refuse_none(resolved, problems)
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
        problems += sentences_of(p for p in found if not problems or p["type"] != "missing")
    if problems:
        raise UserError(f"{where}: {told(problems)}")
    return config


def validate(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Return `values` as a `model`. Raises UserError.

    `where` opens the error message, or is the section that the keys belong to.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        section = [where] if section_of(RunConfig, where) else []
        found = [{**each, "loc": (*section, *each["loc"])} for each in error.errors()]
        opening = "" if section else f"{where}: "
        raise UserError(opening + told(sentences_of(found))) from error


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML, which `load_config` reads back to an equal one."""
    return dump(config.model_dump(mode="json"))


def _resolve_aliases(tree: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the tree with other tools' names moved to ours, and note what is no key.

    A name that is ours in its own place is left alone.
    """
    resolved: dict[str, Any] = {}
    moved: list[tuple[str, str, Any]] = []  # the name given, where it is, the value
    for key, value in tree.items():
        section = section_of(RunConfig, key)
        if section is None and key not in RunConfig.model_fields:
            moved.append((key, "", value))
        elif section is not None and isinstance(value, Mapping):
            resolved[key] = {n: item for n, item in value.items() if _takes(section, n)}
            moved += [(n, key, item) for n, item in value.items() if not _takes(section, n)]
        else:
            resolved[key] = value
    for name, place, value in moved:
        try:
            target, value = _alias(name, value, place)
            _set(resolved, target, value, given=f"{place}.{name}" if place else name)
        except UserError as error:
            problems.append(f"{place}: {error}" if place else str(error))
    return resolved


def _refuse_none(tree: dict[str, Any], problems: list[str], above: str = "") -> None:
    """Note the keys without a value that are written as in Python, where YAML reads a text."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _refuse_none(value, problems, f"{above}{key}.")
        elif value == "None" and _kinds(above + key) & {type(None), list}:
            problems.append(f"{above}{key} = None is the text 'None' in YAML. Write null")
            tree[key] = None


def with_own_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with our names in the place of other tools'.

    A tree with a mistake is returned as it is: `make_config` tells it.
    """
    problems: list[str] = []
    resolved = _resolve_aliases(tree, problems)
    return dict(tree) if problems else resolved


def _takes(section: type[BaseModel], name: str) -> bool:
    is_open = section.model_config.get("extra") == "allow"
    return name in section.model_fields or (is_open and name not in ALIASES)


def _alias(key: str, value: Any, place: str) -> tuple[str, Any]:
    """Return our key and the value for another tool's `key` in the section `place`, or "".

    Raises UserError for any other key, and if `key` means something else in that section.
    """
    if key not in ALIASES:
        raise UserError(unknown_key(key, key, keys_at([place] if place else [])))
    if place not in (*ABOUT_TRAINING, ALIASES[key].partition(".")[0]):
        remedy = ELSEWHERE.get(f"{place}.{key}", f"Write {ALIASES[key]}")
        raise UserError(f"{key!r} is not a key here. {remedy}")
    if key == "report_to":
        value = [] if value in ("none", None) else [value] if isinstance(value, str) else value
    return ALIASES[key], value


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key:
        raise UserError(
            f"the override {override!r} is not of the form key=value. Write e.g. training.epochs=1"
        )
    if not override.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in override):
        raise UserError(f"the override {override!r:.80} is not UTF-8 text. Convert it first")
    place, _, leaf = key.rpartition(".")
    is_alias = (leaf in ALIASES or leaf in NOT_ALIASES) and field_of(key) is None
    is_alias = is_alias and not _is_in_mapping(key)
    target = ALIASES.get(leaf, key) if is_alias else key
    try:
        value = _read(target, text)
    except yaml.YAMLError as error:
        raise UserError(
            f"the value of the override {override!r} is not valid YAML: {yaml_problem(error)}"
        ) from error
    if is_alias:
        target, value = _alias(leaf, value, place)
    _set(tree, target, value, given=None)


def _read(key: str, text: str) -> Any:
    """Return the value of an override: the text as it is for a key that takes text.

    A text that is in quotation marks as a whole is read as YAML, and so is null for a key that may
    have no value; it may be written None. A key that also takes lists or mappings takes them in
    brackets.
    """
    kinds = _kinds(key) or ({str, object} if _is_in_mapping(key) else set())
    if text.strip() == "None" and (not kinds or kinds & {type(None), object, list}):
        return None  # as in Python
    if not kinds & {str, Path}:
        return parse(text)
    is_text = kinds <= {str, Path, type(None)}
    if type(None) in kinds and text.strip() in ("", "~", "null"):
        return None
    try:
        value = parse(text)
    except yaml.YAMLError:
        closing = {"[": "]", "{": "}"}.get(text.lstrip()[:1])
        if is_text or closing is None or closing in text.rstrip()[:-1]:  # [a].jsonl
            return text
        raise
    is_quoted = isinstance(value, str) and text.strip()[:1] in ("'", '"')
    is_other = text.lstrip().startswith(("[", "{")) or value is None
    if object in kinds:
        is_other = is_other or not isinstance(value, str | dict)
    is_other = is_other and not text.lstrip().startswith("#")  # a comment, in YAML
    return value if is_quoted or (is_other and not is_text) else text


def _kinds(key: str) -> set[Any]:
    """Return the types of value that the key takes."""
    parent = field_of(key.rpartition(".")[0])
    if parent is not None and parent.annotation == dict[str, str]:
        return {str}
    field = field_of(key)
    if field is None:
        return set()
    if item_section_of(DataSection, key.removeprefix("data.")):
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
                f"{dotted} cannot be set: {'.'.join(parents[: depth + 1])} is "
                f"{kind_in_words(below)}, not a section"
            )
        tree = below
    if given is not None and leaf in tree:
        raise UserError(f"{given!r} and {dotted!r} mean the same. Give one of them")
    tree[leaf] = value


def _is_in_mapping(dotted: str) -> bool:
    """Return whether a dotted key is below a key whose value is any mapping (model.config)."""
    parts = dotted.split(".")
    fields = [field_of(".".join(parts[:depth])) for depth in range(1, len(parts))]
    return any(field is not None and "dict" in str(field.annotation) for field in fields)
