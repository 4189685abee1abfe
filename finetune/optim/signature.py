"""The options of an optimizer, read from the source of its class: its library is not imported."""

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def read_signature(origin: str) -> tuple[str, ...]:
    """Return the options of the class "module:Class", in the order of its signature.

    None of them if the source does not show all.
    """
    module, _, name = origin.partition(":")
    source = _source_of(module)
    if source is None:
        return ()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _options_of(node)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return read_signature(f"{node.module}:{alias.name}")
    return ()


def _source_of(module: str) -> str | None:
    """Return the text of a module. Its packages are not imported, as find_spec would do."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(next(iter(spec.submodule_search_locations)), *parts)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _options_of(node: ast.ClassDef) -> tuple[str, ...]:
    made = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    if not made or made[0].args.kwarg or made[0].args.vararg:
        return ()
    given = made[0].args
    positional = [*given.posonlyargs, *given.args][2:]  # without self and the parameters
    return tuple(argument.arg for argument in (*positional, *given.kwonlyargs))
