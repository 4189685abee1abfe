"""The rules of the house that a machine can check. Each test counts what it looked at.

A room is an entry of TIERS. Its files are those below it that are in no room of their own.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from sys import stdlib_module_names

import pytest

import finetune
from finetune.run.folder import RunDir

PACKAGE = Path(finetune.__file__).parent
ROOT = Path(__file__).parents[1]

TIERS = (  # a room imports from its own tier and from those above it here
    ("errors", "run", "data.types"),
    ("data", "compute", "optim", "comparison", "landscape", "report"),
    ("data.sources", "models", "distributed", "display", "integrations"),
    ("inference", "evaluation"),
    ("training", "config", "serving"),
    ("recipes",),
    ("cli", "api", "__main__", "finetune"),  # finetune is the package's own __init__
)
TIER = {room: number for number, rooms in enumerate(TIERS) for room in rooms}
PARTS_OF_ROOMS = {"data.types", "data.sources"}  # rooms inside of a room; nothing else is one

BORDERS = {  # third party -> the rooms that import it; only they may, and all of them do
    "annotated_types": {"config"},
    "accelerate": {"distributed", "training", "recipes"},
    "datasets": {"data.sources"},
    "fastapi": {"serving"},
    "gguf": {"models"},
    "huggingface_hub": {"data.sources", "models"},
    "jinja2": {"data", "report"},
    "langcodes": {"data"},
    "language_data": {"data"},
    "markupsafe": {"report"},
    "matplotlib": {"landscape", "report"},
    "numpy": {"data", "landscape", "models", "report"},
    "optuna": {"recipes"},
    "peft": {"models"},
    "psutil": {"recipes"},
    "pyarrow": {"data.sources"},
    "pydantic": {"config", "serving"},
    "rich": {"display", "recipes"},
    "sacrebleu": {"evaluation"},
    "safetensors": {"models"},
    "scipy": {"comparison"},
    "sqlalchemy": {"recipes"},
    "starlette": {"serving"},
    "tokenizers": {"models"},
    "transformers": {"models"},
    "typer": {"cli"},
    "uvicorn": {"serving"},
    "xxhash": {"data", "training"},
    "yaml": {"config", "recipes"},
}
WITHOUT_TORCH = {"api", "errors", "config", "data.sources", "display", "report", "cli", "__main__"}
KNOW_THE_CONFIG = {"recipes", "cli", "api", "finetune"}

AT_THE_TOP = {"__init__", "__main__", "api", "errors", "display"}
FILES_A_FOLDER, LINES_A_FILE, LINES_A_FUNCTION, COLUMNS = 14, 400, 70, 100
PRAGMA = re.compile(r"  # (type: ignore|noqa|fmt:).*")  # may go beyond, as for ruff
LEAST_LINES = 30  # of a file with one importer
ANY_PER_1000_LINES = 19.2  # may only fall

# command -> what may import its files, besides the doors and the command itself
IMPORTED = {
    "train": {"recipes.demo", "recipes.compare"},
    "plan": {"recipes.init"},  # what fits into memory
}


def modules() -> dict[str, Path]:
    """Return dotted name below `finetune` -> file, for every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts) or "finetune"] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def above(name: str) -> list[str]:
    """Return `name` and the packages above it, the longest first."""
    parts = name.split(".")
    return [".".join(parts[:number]) for number in range(len(parts), 0, -1)]


def room(name: str) -> str:
    """Return the room of a module. Raises StopIteration if it is in none."""
    return next(candidate for candidate in above(name) if candidate in TIER)


def is_package(name: str) -> bool:
    return MODULES[name].name == "__init__.py"


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def internal(name: str) -> str | None:
    """Return the module that a name is from: `finetune.data.types.Example` -> `data.types`."""
    if name.split(".")[0] != "finetune":
        return None
    inside = name.removeprefix("finetune.")
    return next((module for module in above(inside) if module in MODULES), "finetune")


IMPORTS = {name: imports(path) for name, path in MODULES.items()}
EDGES = {  # module -> modules of the package that it imports
    name: {module for imported in found if (module := internal(imported)) not in (None, name)}
    for name, found in IMPORTS.items()
}


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the nodes of a circle, the first and the last being one; nothing if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_something_to_check():
    assert len(MODULES) > 150
    assert sum(map(len, EDGES.values())) > 500


# Rooms


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES} == set(TIER)
    assert {name for name in TIER if "." in name} == PARTS_OF_ROOMS


def test_a_room_imports_from_its_tier_and_lower_ones():
    upward = [
        f"{name} imports {target}, which is higher"
        for name, targets in EDGES.items()
        for target in targets
        if TIER[room(target)] > TIER[room(name)]
    ]
    assert upward == []


def test_there_are_no_circles():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert circle(EDGES) == []
    rooms: dict[str, set[str]] = {name: set() for name in TIER}
    for name, targets in EDGES.items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    assert sum(map(len, rooms.values())) > 50
    assert circle(rooms) == []


def test_third_parties_come_in_at_their_border():
    found: dict[str, set[str]] = {}
    for name, imported in IMPORTS.items():
        for library in {each.split(".")[0] for each in imported}:
            if library != "finetune" and library not in stdlib_module_names:
                found.setdefault(library, set()).add(room(name))
    assert found.pop("torch") & WITHOUT_TORCH == set()
    assert found == BORDERS


def test_only_the_recipes_and_the_doors_know_the_config():
    knowing = {room(name) for name, targets in EDGES.items() if "config" in map(room, targets)}
    assert knowing - {"config"} == KNOW_THE_CONFIG


def test_only_run_opens_the_records_of_a_run():
    found = {name: opened(MODULES[name]) for name in MODULES if room(name) != "run"}
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines} == {}


OPENERS = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "touch"}
OTHERS = {"report", "checkpoints", "model", "bad_batch"}  # written by the rooms that own them
RECORDS = {name for name, item in vars(RunDir).items() if isinstance(item, property)} - OTHERS
RECORD_NAMES = {getattr(RunDir(Path()), record).name for record in RECORDS} - {"config.yaml"}


def opened(code: Path | str) -> list[str]:
    """Return what in `code` opens the record of a run, or names its file, as `line: source`."""
    tree = ast.parse(code.read_text(encoding="utf-8") if isinstance(code, Path) else code)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr in OPENERS:
                found += [node for name in [function.value] if is_record(name)]
            elif isinstance(function, ast.Name) and function.id == "open":
                found += [node for name in node.args[:1] if is_record(name)]
        elif isinstance(node, ast.For | ast.comprehension):  # for path in (run.data, run.metrics)
            parts = node.iter.elts if isinstance(node.iter, ast.Tuple | ast.List) else []
            found += [part for part in parts if is_record(part)]
        elif isinstance(node, ast.Constant) and node.value in RECORD_NAMES:
            found.append(node)
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found]


def is_record(node: ast.AST) -> bool:
    """Return whether `node` is a record's path: run.data, opened.run.data, RunDir(root).data."""
    if not isinstance(node, ast.Attribute) or node.attr not in RECORDS:
        return False
    owner = node.value.func if isinstance(node.value, ast.Call) else node.value
    return ast.unparse(owner).split(".")[-1].lstrip("_") in ("run", "RunDir")


def test_the_rule_of_records_sees_what_it_forbids():
    for code in (
        "run.environment.read_text(encoding='utf-8')",
        "opened.run.evaluation.write_text('')",
        "RunDir(root / 'a').metrics.open('a')",
        "open(self.run.samples)",
        "texts = [path.read_text() for path in (run.data, run.environment)]",
        "(root / 'metrics.jsonl').read_text()",
    ):
        assert opened(code), code
    for code in (
        "config.data.train",
        "load_config(run.config)",
        "(run.model / 'README.md').open()",
    ):
        assert not opened(code), code
    assert len(RECORDS) >= 9
    assert len(RECORD_NAMES) >= 8


# Commands


def commands() -> dict[str, str]:
    """Return the functions of the CLI's commands -> their modules."""
    return {
        node.name: name
        for name, tree in TREES.items()
        if room(name) == "cli"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and "app.command" in map(called, node.decorator_list)
    }


def called(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def test_a_recipe_is_called_as_its_command_is():
    recipes = {name.split(".")[1] for name in MODULES if name.startswith("recipes.")}
    assert len(commands()) >= 14
    assert recipes - {"build"} <= set(commands())
    assert len(recipes) >= 10


def test_what_commands_share_is_in_build():
    found, looked_at = [], 0
    for name, targets in EDGES.items():
        for target in targets:
            if not target.startswith("recipes.") or target.startswith("recipes.build"):
                continue
            looked_at += 1
            command = target.split(".")[1]
            allowed = {"cli", "api", f"recipes.{command}", *IMPORTED.get(command, ())}
            if not allowed & set(above(name)):
                found.append(f"{name} imports {target}")
    assert looked_at > 20
    assert found == []


# Sizes


def test_at_the_top_are_the_doors_errors_and_display():
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_TOP
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_a_folder_holds_few_files():
    counts: dict[Path, int] = {}
    for path in MODULES.values():
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    assert len(counts) > 20
    assert {path: count for path, count in counts.items() if count > FILES_A_FOLDER} == {}


def test_files_and_functions_stay_small():
    large, functions = [], 0
    for name, tree in TREES.items():
        lines = MODULES[name].read_text(encoding="utf-8").count("\n")
        if lines > LINES_A_FILE:
            large.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                lines = node.end_lineno - node.lineno + 1
                if lines > LINES_A_FUNCTION:
                    large.append(f"{name}.{node.name}: {lines} lines")
    assert functions > 900
    assert large == []


@pytest.mark.parametrize("folder", ["finetune", "tests", "scripts", "examples"])
def test_a_line_has_at_most_100_columns(folder):
    long, lines = [], 0
    for path in sorted((ROOT / folder).rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            lines += 1
            if len(PRAGMA.sub("", line)) > COLUMNS:
                long.append(f"{path.relative_to(ROOT)}:{number}")
    assert lines > 400
    assert long == []


def test_a_small_file_with_one_importer_is_part_of_it():
    importers = {name: [n for n, targets in EDGES.items() if name in targets] for name in MODULES}
    apart = {"data.formats", "integrations", *(f"recipes.{command}" for command in commands())}
    small = [
        f"{name} ({len(lines)} lines) belongs to {importers[name][0]}"
        for name, path in MODULES.items()
        if len(lines := path.read_text(encoding="utf-8").splitlines()) < LEAST_LINES
        and len(importers[name]) == 1
        and not is_package(name)
        and not apart & set(above(name))
    ]
    assert max(map(len, importers.values())) > 20
    assert small == []


# Names, types and words


def names_of(tree: ast.Module) -> set[str]:
    """Return the names that a module defines: functions, classes and constants."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            found |= {part.id for part in parts if isinstance(part, ast.Name)}
    return found


def test_a_public_name_has_one_home():
    homes: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for public in names_of(tree):
            is_typed = commands().get(public) == name or name == "api"  # what users type
            if not public.startswith("_") and not is_typed:
                homes.setdefault(public, []).append(name)
    assert len(homes) > 600
    assert {public: found for public, found in homes.items() if len(found) > 1} == {}


def test_any_becomes_rarer():
    count = sum(
        isinstance(node, ast.Name) and node.id == "Any"
        for tree in TREES.values()
        for node in ast.walk(tree)
    )
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in MODULES.values())
    assert 0 < 1000 * count / lines <= ANY_PER_1000_LINES


def test_every_module_says_what_it_is():
    said = {name: ast.get_docstring(tree) or "" for name, tree in TREES.items()}
    assert [name for name, text in said.items() if not text] == []
    assert [name for name, text in said.items() if re.search(r"\b[Ff]loor \d", text)] == []


def test_every_test_folder_holds_tests():
    folders = {path.parent for path in Path(__file__).parent.rglob("*.py")}
    assert len(folders) > 12
    assert [folder for folder in folders if not list(folder.glob("test_*.py"))] == []
