"""Nobody outside `finetune/run` opens a record of a run."""

import ast
from pathlib import Path

import finetune
from finetune.run.folder import RunDir

PACKAGE = Path(finetune.__file__).parent
OPENERS = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "touch"}
OTHERS = {"report", "checkpoints", "model", "bad_batch"}  # written by the rooms that own them
RECORDS = {name for name, item in vars(RunDir).items() if isinstance(item, property)} - OTHERS
NAMES = {getattr(RunDir(Path()), record).name for record in RECORDS} - {"config.yaml"}


def opened(code: str) -> list[str]:
    """Return what in `code` opens the record of a run, or names its file, as `line: source`."""
    tree = ast.parse(code)
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
        elif isinstance(node, ast.Constant) and node.value in NAMES:
            found.append(node)
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found]


def is_record(node: ast.AST) -> bool:
    """Return whether `node` is a record's path: run.data, opened.run.data, RunDir(root).data."""
    if not isinstance(node, ast.Attribute) or node.attr not in RECORDS:
        return False
    owner = node.value.func if isinstance(node.value, ast.Call) else node.value
    return ast.unparse(owner).split(".")[-1].lstrip("_") in ("run", "RunDir")


def test_the_rule_sees_what_it_forbids():
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
    assert len(NAMES) >= 8


def test_only_run_opens_the_records_of_a_run():
    modules = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "run"]
    found = {str(path.relative_to(PACKAGE)): opened(path.read_text()) for path in modules}
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines} == {}
