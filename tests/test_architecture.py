"""The house rules that a machine can check: floors, borders, sizes. A file without a floor fails."""

import ast
from pathlib import Path

import finetune

PACKAGE = Path(finetune.__file__).parent

FLOORS = {  # the longest matching prefix counts
    "errors": 0,
    "data": 1,
    "data.types": 0,
    "run": 0,
    "compute": 1,
    "optim": 1,
    "memory": 3,
    "report": 1,
    "landscape": 1,
    "comparison": 1,
    "models": 2,
    "data.sources": 2,
    "display": 2,
    "distributed": 2,
    "integrations": 2,
    "evaluation": 3,
    "inference": 3,
    "config": 4,
    "training": 4,
    "recipes": 5,
    "cli": 6,
    "__main__": 6,
    "": 6,  # finetune/__init__.py
}

BORDERS = {  # third party -> where it may be imported
    "datasets": {"data.sources"},
    "transformers": {"models"},
    "peft": {"models"},
    "tokenizers": {"models"},
    "gguf": {"models"},
    "safetensors": {"models"},
    "sacrebleu": {"evaluation"},
    "matplotlib": {"report", "landscape"},
    "jinja2": {"report", "models"},
    "rich": {"display", "cli", "recipes"},
    "typer": {"cli"},
    "pydantic": {"config"},
    "yaml": {"config", "recipes"},
    "accelerate": {"training", "distributed", "recipes"},
    "optuna": {"recipes"},
    "scipy": {"comparison"},
}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 70


def modules() -> dict[str, Path]:
    """Dotted name below `finetune` -> file, for every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def place(name: str, table: dict) -> str | None:
    """The longest entry of `table` that is `name` or a package above it; only "" itself matches ""."""
    parts = name.split(".")
    candidates = [".".join(parts[:n]) for n in range(len(parts), 0, -1)] if name else [""]
    return next((c for c in candidates if c in table), None)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def internal(name: str, known: dict[str, Path]) -> str | None:
    """`finetune.data.types.Example` -> `data.types`."""
    if name != "finetune" and not name.startswith("finetune."):
        return None
    parts = name.split(".")[1:]
    return next(
        (".".join(parts[:n]) for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in known),
        None,
    )


def test_there_is_something_to_check():
    assert len(modules()) > 30


def test_every_module_has_a_floor():
    assert [name for name in modules() if place(name, FLOORS) is None] == []


def test_imports_only_look_down():
    known = modules()
    upward, edges = [], 0
    for name, path in known.items():
        floor = FLOORS[place(name, FLOORS)]
        for imported in imports(path):
            target = internal(imported, known)
            if target is None or (target == "" and name == ""):
                continue
            edges += 1
            if FLOORS[place(target, FLOORS)] > floor:
                upward.append(
                    f"{name} (floor {floor}) imports {target} (floor {FLOORS[place(target, FLOORS)]})"
                )
    assert edges > 50
    assert upward == []


def test_third_parties_come_in_at_their_border():
    trespassing, seen = [], set()
    for name, path in modules().items():
        for imported in imports(path):
            library = imported.split(".")[0]
            if library in BORDERS:
                seen.add(library)
                if place(name, dict.fromkeys(BORDERS[library])) is None:
                    trespassing.append(f"{name} imports {library}")
    assert trespassing == []
    assert seen >= {"datasets", "transformers", "peft", "accelerate", "typer", "pydantic"}


def test_files_and_functions_stay_small():
    large, functions = [], 0
    for name, path in modules().items():
        text = path.read_text()
        if text.count("\n") > MAX_FILE_LINES:
            large.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                    large.append(f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert functions > 100
    assert large == []


def test_every_module_says_what_it_is():
    assert [
        name
        for name, path in modules().items()
        if not ast.get_docstring(ast.parse(path.read_text()))
    ] == []


def test_every_test_folder_holds_tests():
    folders = {path.parent for path in Path(__file__).parent.rglob("test_*.py")}
    assert len(folders) >= 4
