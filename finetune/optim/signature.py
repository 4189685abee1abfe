"""The options of an optimizer, read from the source of its class: its library is not imported."""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any


@cache
def read_signature(origin: str) -> dict[str, Any] | None:
    """Return option -> default of the class "module:Class", in the order of its signature.

    A default that is no literal is an Ellipsis. None if the source does not show the options.
    """
    module, _, name = origin.partition(":")
    source = _source_of(module)
    if source is None:
        return None
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _options_of(node)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return read_signature(f"{node.module}:{alias.name}")
    return None


def _source_of(module: str) -> str | None:
    """Return the text of a module. Its packages are not imported, as find_spec would do."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(next(iter(spec.submodule_search_locations)), *parts)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _options_of(node: ast.ClassDef) -> dict[str, Any] | None:
    made = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    if not made or made[0].args.kwarg or made[0].args.vararg:
        return None
    given = made[0].args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    pairs = [*zip(positional, defaults, strict=True)][2:]  # without self and the parameters
    pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    return {argument.arg: _literal(default) for argument, default in pairs}


def _literal(node: ast.expr | None) -> Any:
    try:
        return ... if node is None else ast.literal_eval(node)
    except ValueError:
        return ...
