"""The form of every error message: what is wrong; then, as a sentence of its own, what to do."""

import ast
import re
from pathlib import Path

import pytest

import finetune

PACKAGE = Path(finetune.__file__).parent
REMEDIES = (
    "add|call|change|check|choose|continue|convert|correct|delete|draw|finish|free|give|go on|"
    "install|keep|leave|load|log in|lower|make|name|raise|remove|rename|restore|resume|run|save|"
    "set|shorten|start|switch|take|train|try|use|write"
)
HANGING = re.compile(rf"[;:] ({REMEDIES}) ")  # on the sentence that says what is wrong
A_SENTENCE = re.compile(r"(?<=[a-z0-9)\]'`\"…][.!?]) (?=[A-Z])")


def problem(message: str) -> str | None:
    """Return what is wrong with the form of `message`, or None."""
    if message.endswith((".", "!", ";", ":", ",")):
        return "it ends with a full stop or the like"
    if HANGING.search(message):
        return "what to do is not a sentence of its own"
    return "it has more than two sentences" if len(A_SENTENCE.split(message)) > 2 else None


def messages(code: str) -> list[tuple[int, str]]:
    """Return the line and the text of each UserError that is raised; `…` stands for a value."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
            if getattr(call.func, "id", "") == "UserError" and call.args:
                found.append((node.lineno, text(call.args[0])))
    return found


def text(node: ast.expr) -> str:
    """Return the text of a string expression, with `…` for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return "…"


@pytest.mark.parametrize(
    "message",
    ["a is 3; give 4", "a is 3: set a=4", "a is 3.", "a is 3. Give 4.", "No a. No b. Give one"],
)
def test_the_rule_sees_what_it_forbids(message):
    assert problem(message)


def test_every_message_has_the_form():
    found = [
        (f"{path.relative_to(PACKAGE)}:{line}", message)
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, message in messages(path.read_text(encoding="utf-8"))
    ]
    assert len(found) > 200
    assert len([message for _, message in found if "…" in message]) > 150
    wrong = {place: (problem(message), message) for place, message in found if problem(message)}
    assert wrong == {}
