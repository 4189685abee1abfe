"""Every key of a config with its default, its values and its meaning, as `schema.py` has them.

The meaning of a key is the comment beside it or above it there, so it is written once.
"""

import inspect
import io
import json
import re
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from pydantic import BaseModel

from finetune.config import schema
from finetune.config.other_tools import ALIASES, NOT_ALIASES
from finetune.config.schema import RunConfig
from finetune.errors import UserError, did_you_mean

_FIELD = re.compile(r" {4}(\w+): ")
_YAML = {"None": "null", "True": "true", "False": "false"}
_LITERALS = re.compile(r"\b(None|True|False)\b")
_BEYOND = 1_000_000  # a limit above this only keeps numbers in their range, and is not said


@dataclass(frozen=True)
class Key:
    """One key that a config may have."""

    name: str  # dotted
    default: str  # as in YAML; "" if the key must be given
    values: str  # what it takes, in words
    meaning: str  # sentences, with units


def list_keys(pattern: str = "*") -> list[Key]:
    """Return the keys whose dotted names match a pattern or contain it, in the schema's order.

    Another tool's name finds the key that means the same. Raises UserError if there is none.
    """
    found = list(_keys(RunConfig, ""))
    wanted = pattern.lower() if set(pattern) & set("*?[") else f"*{pattern.lower()}*"
    matching = [key for key in found if fnmatchcase(key.name, wanted)]
    if not matching:
        if pattern in ALIASES:
            return list_keys(ALIASES[pattern])
        if pattern in NOT_ALIASES:
            raise UserError(f"{pattern!r} is not a key here. {NOT_ALIASES[pattern]}")
        names = [key.name for key in found]
        near = did_you_mean(pattern, [*names, *(name.rpartition(".")[2] for name in names)])
        raise UserError(
            f"no key matches {pattern!r}{near or '. Run `finetune keys` to list them all'}"
        )
    return matching


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file, for editors. Every key has its meaning there."""
    root = RunConfig.model_json_schema()
    sections = {"RunConfig": root, **root["$defs"]}
    for name, section in sections.items():
        meanings = _meanings(getattr(schema, name))
        for key, entry in section.get("properties", {}).items():
            entry.pop("title", None)
            if meaning := meanings.get(key):
                entry["description"] = meaning
    for entry in root["$defs"]["DataSection"]["properties"].values():
        _allow_paths(entry)
    root["required"] = [key for key in root["required"] if key != "output_dir"]  # has a default
    root["patternProperties"] = {"^(x-|\\.)": {}}  # what `<<: *name` merges elsewhere
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root}


def _allow_paths(entry: dict[str, Any]) -> None:
    """Let a list of sources also be one source, and a source also be a path."""
    lists = [part for part in (entry, *entry.get("anyOf", ())) if part.get("type") == "array"]
    for part in lists:
        if part.get("items") == {"$ref": "#/$defs/SourceSection"}:
            source = {"anyOf": [{"type": "string"}, dict(part["items"])]}
            for name in ("type", "items"):
                part.pop(name)
            part["anyOf"] = [*source["anyOf"], {"type": "array", "items": source, "minItems": 1}]


def _keys(model: type[BaseModel], above: str) -> Iterator[Key]:
    properties = model.model_json_schema(mode="validation")
    meanings = _meanings(model)
    for name, field in model.model_fields.items():
        if name == "train":
            yield Key("data.train", "", "a path, or a list of sources", meanings[name])
            yield from _keys(schema.SourceSection, "data.train[].")
            continue
        section = _section_of(field.annotation)
        always = section == field.annotation  # it cannot be null
        if section is not None and always:
            yield from _keys(section, f"{above}{name}.")
            continue
        entry = properties["properties"][name]
        default = "" if field.is_required() else _as_yaml(field.default)
        values = _in_words(entry, properties.get("$defs", {}))
        yield Key(above + name, default, values, meanings.get(name, ""))
        if section is not None:
            yield from _keys(section, f"{above}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section's class if a key holds a section, also an optional one."""
    members = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)


def _as_yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, default=str, ensure_ascii=False).replace('"', "")


def _in_words(entry: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """Return what values a property of a JSON schema takes."""
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(_in_words(part, sections) for part in entry["anyOf"]))
    if "const" in entry:
        return str(entry["const"])
    if "enum" in entry:
        return " | ".join(map(str, entry["enum"]))
    if "$ref" in entry:
        return "a mapping"
    kind = entry.get("type")
    if kind in ("integer", "number"):
        word = "a whole number" if kind == "integer" else "a number"
        limits = {
            "minimum": "at least", "exclusiveMinimum": "above",
            "maximum": "at most", "exclusiveMaximum": "below",
        }  # fmt: skip
        said = [
            f"{text} {entry[key]:,g}"
            for key, text in limits.items()
            if entry.get(key, _BEYOND) < _BEYOND
        ]
        return f"{word}{' ' if said else ''}{', '.join(said)}"
    if kind == "array":
        items = entry.get("items", {})
        return "a path, or a list of sources" if "$ref" in items else "a list"
    words = {
        "string": "text", "boolean": "true | false", "object": "a mapping", "null": "null",
    }  # fmt: skip
    return words.get(str(kind), "anything")


@cache
def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return key -> the comments above its line and at its end, as sentences."""
    source = inspect.getsource(model)
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.removeprefix("#").strip()
    lines = source.splitlines()
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = _FIELD.match(line)
        if match is None or match[1] not in model.model_fields:
            continue
        first = number
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        parts = [comments[n] for n in range(first, number + 1) if n in comments]
        found[match[1]] = _LITERALS.sub(lambda literal: _YAML[literal[0]], " ".join(parts))
    return found
