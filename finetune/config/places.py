"""The places of the schema: sections, fields and keys by their dotted names."""

import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from finetune.config.schema import RunConfig


def section_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
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


def field_of(dotted: str) -> Any:
    """Return the schema's field at a dotted key, or None."""
    model: type[BaseModel] | None = RunConfig
    field = None
    for part in dotted.split("."):
        if model is None or part not in model.model_fields:
            return None
        field, model = model.model_fields[part], section_of(model, part)
    return field


def keys_at(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in path:
        if part.isdigit():
            continue
        found = section_of(model, part) or item_section_of(model, part)
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def item_section_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the class of the items if `key` holds a list of sections (data.train)."""
    field = model.model_fields.get(key)
    pending: list[Any] = [field.annotation] if field is not None else []
    while pending:
        item = pending.pop()
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
        pending.extend(typing.get_args(item))
    return None
