"""The way from a YAML file and `key=value` overrides to a RunConfig.

Each mistake becomes a UserError that names the place, the value and what is allowed.
"""

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from finetune.config.schema import RunConfig
from finetune.config.yaml12 import parse
from finetune.errors import UserError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)

NOT_ALLOWED = " is not allowed: "
SHOULD_BE = "input should be "  # pydantic's words

ALIASES = {
    "model_name_or_path": "model.name",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "optim": "optimizer.name",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "max_grad_norm": "training.max_grad_norm",
    "gradient_checkpointing": "training.activation_checkpointing",
    "torch_compile": "training.compile",
    "warmup_steps": "scheduler.warmup_steps",
    "warmup_ratio": "scheduler.warmup_ratio",
    "lr_scheduler_type": "scheduler.name",
    "eval_steps": "evaluation.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "packing": "data.packing",
    "attn_implementation": "model.attn_implementation",
    "report_to": "tracking",
}
"""Hugging Face's names (TrainingArguments, SFTConfig) that mean the same, anywhere in the file."""

NOT_ALIASES = {
    "gradient_accumulation_steps": "Set training.batch_size (sequences per step, over all "
    "processes) and training.micro_batch_size, from which it follows",
    "per_device_train_batch_size": "Set training.batch_size to it times the processes times "
    "gradient_accumulation_steps, and training.micro_batch_size to the sequences per forward",
    "bf16": "Write training.precision: bf16",
    "fp16": "Write training.precision: fp16",
    "dataset_name": "Write data.train: NAME",
    "load_best_model_at_end": "Write checkpoint.save_best_model: true",
    "metric_for_best_model": "Write evaluation.best: loss or chrf",
    "max_rows": "Write max_records",
    "max_validation_rows": "Write data.max_validation_records",
}
"""Hugging Face's names without an equal, and former names. The value says what to do instead."""


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
    """Return the config that a tree from YAML describes. `where` opens each error message.

    Raises UserError.
    """
    resolved = _resolve_aliases(tree, where)
    for override in overrides:
        _apply(resolved, override)
    return validate(RunConfig, resolved, where=where)


def validate(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Return `values` as a `model`. `where` opens the error message. Raises UserError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: " + ". ".join(_sentences(error))) from error


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML, which `load_config` reads back to an equal one."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
    )


def _resolve_aliases(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the tree with Hugging Face's names moved to ours.

    A name that is ours in its own place is left alone.
    """
    resolved: dict[str, Any] = {}
    moved: list[tuple[str, str, Any]] = []  # the name given, our key, the value
    for key, value in tree.items():
        section = _section(RunConfig, key)
        if section is None and key not in RunConfig.model_fields:
            moved.append((key, *_alias(key, value, where, RunConfig.model_fields)))
        elif section is not None and isinstance(value, Mapping):
            inner = {}
            for name, item in value.items():
                if _takes(section, name):
                    inner[name] = item
                else:
                    found = _alias(name, item, f"{where}: {key}", section.model_fields)
                    moved.append((f"{key}.{name}", *found))
            resolved[key] = inner
        else:
            resolved[key] = value
    for given, target, value in moved:
        _set(resolved, target, value, given=given)
    return resolved


def _takes(section: type[BaseModel], name: str) -> bool:
    is_open = section.model_config.get("extra") == "allow"
    return name in section.model_fields or (is_open and name not in ALIASES)


def _alias(key: str, value: Any, where: str, known: Iterable[str]) -> tuple[str, Any]:
    """Return our key and the value for another tool's `key`. Raises UserError for any other."""
    if key in NOT_ALIASES:
        raise UserError(f"{where}: {key!r} is not a key here. {NOT_ALIASES[key]}")
    if key not in ALIASES:
        near = did_you_mean(str(key), [*known, *ALIASES])
        raise UserError(f"{where}: {key!r} is not a key; the keys are {', '.join(known)}{near}")
    if key == "report_to":
        value = [] if value in ("none", None) else [value] if isinstance(value, str) else value
    return ALIASES[key], value


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(
            f"the override {override!r} is not of the form key=value. Write e.g. training.epochs=1"
        )
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"the value of the override {override!r} is not valid YAML: {_yaml_problem(error)}"
        ) from error
    leaf = key.rpartition(".")[2]
    if (leaf in ALIASES or leaf in NOT_ALIASES) and _field(key) is None:
        key, value = _alias(leaf, value, "override", RunConfig.model_fields)
    _set(tree, key, value, given=None)


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


def _sentences(error: ValidationError) -> list[str]:
    """Return one for each key: pydantic has a problem with each kind of value that is allowed."""
    reasons: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
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
    if problem["type"] == "extra_forbidden" and path[-1] in NOT_ALIASES:
        return f"{key!r} is not a key here. {NOT_ALIASES[path[-1]]}"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        near = did_you_mean(path[-1], known)
        return f"{key!r} is not a key; the keys there are {', '.join(known)}{near}"
    if problem["type"] == "missing":
        return f"{key!r} is missing and has no default. Add it"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    is_plain = isinstance(given, str | int | float | bool) or given is None
    shown = repr(given) if is_plain else _kind(given)
    if problem["type"] == "model_type":
        why = SHOULD_BE + "a mapping of keys to values"
    elif problem["type"] == "tuple_type":
        why = SHOULD_BE + f"a list, such as [{'' if given is None else given}]"
    else:
        why = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{key} = {shown}{NOT_ALLOWED}{why}"


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
