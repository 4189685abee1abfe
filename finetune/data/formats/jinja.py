"""The text of a chat template: the generation prompt that it lacks, a fixed date, its variables."""

import json
import re
import string
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import takewhile

from jinja2 import Environment, TemplateError, nodes

Render = Callable[..., str]
"""`render(messages, add_generation_prompt=False)` returns a conversation as text."""


def missing_generation_prompt(render: Render) -> str:
    """Return what a template writes before an answer but never before a place for one.

    That is the header of the assistant's turn, if the template ignores `add_generation_prompt`.
    The result is empty if nothing is missing. White space is no header.
    """
    question = [{"role": "user", "content": "Is it?"}]
    try:
        prompt = render(question, add_generation_prompt=True)
        if prompt != render(question):
            return ""
        answers = [
            render([*question, {"role": "assistant", "content": word}]) for word in ("Yes", "No")
        ]
    except ValueError:
        return ""
    header = shared_start(*answers).removeprefix(prompt)
    return header if header.strip() and all(text.startswith(prompt) for text in answers) else ""


def shared_start(first: str, second: str) -> str:
    """Return the characters that both texts begin with."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second))
    return "".join(character for character, _ in pairs)


def with_generation_prompt(template: str, header: str) -> str:
    """Return the template with `header` at the place where the assistant answers."""
    if not header:
        return template
    quoted = json.dumps(header, ensure_ascii=False)
    # Jinja takes one line break off the end of a template, so it goes before something is added.
    return (
        template.removesuffix("\n")
        + "{% if add_generation_prompt %}{{ "
        + quoted
        + " }}{% endif %}"
    )


def prints_the_date(template: object) -> bool:
    """Return whether a template, or one of several by name, asks for the time."""
    if isinstance(template, Mapping):
        return any(map(prints_the_date, template.values()))
    return "strftime_now" in str(template)


def with_date(template: str, now: datetime) -> str:
    """Return the template with the time standing still at `now`.

    A macro takes the place of the function `strftime_now` that transformers gives to templates.
    """
    if not prints_the_date(template):
        return template
    codes = {
        f"%{flag}{letter}": now.strftime(f"%{flag}{letter}")
        for flag in ("", "-")
        for letter in string.ascii_letters
        if now.strftime(f"%{flag}{letter}") != f"%{flag}{letter}"
    }
    return (
        "{%- macro strftime_now(format) -%}{%- set said = namespace(text=format) -%}"
        "{%- for code, value in "
        + json.dumps(codes)
        + ".items() -%}{%- set said.text = said.text.replace(code, value) -%}{%- endfor -%}"
        "{{- said.text -}}{%- endmacro +%}" + template
    )


def names_variable(template: str, name: str) -> bool:
    """Return whether the code of a template has a variable of this name, comments aside."""
    code = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    return re.search(rf"(?<![\w.]){re.escape(name)}\b", code) is not None


_HIDING = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block)
_MESSAGES_OF_LOOP = ("previtem", "nextitem", "changed", "cycle")


def writes_content_as_it_is(template: str) -> bool:
    """Return whether a template does nothing with the content of a message but write it.

    Then only the roles and their order decide what else it writes. It is read off the code, and
    False whenever this is not plain to see.
    """
    try:
        code = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:
        return False
    if prints_the_date(template) or next(code.find_all(_HIDING), None) is not None:
        return False
    written: set[int] = set()  # contents that are written, and nodes that hold messages well
    queue = [node for output in code.find_all(nodes.Output) for node in output.nodes]
    while queue:
        node = queue.pop()
        written.add(id(node))
        if isinstance(node, nodes.Add):
            queue += [node.left, node.right]
        elif isinstance(node, nodes.Concat):
            queue += node.nodes
    loops = [
        loop
        for loop in code.find_all(nodes.For)
        if isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages"
    ]
    names = {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}
    whole = {id(loop.iter) for loop in loops}  # messages, as a loop goes through them
    parts: list[nodes.Getattr | nodes.Getitem] = [
        *code.find_all(nodes.Getattr),
        *code.find_all(nodes.Getitem),
    ]
    keys = {id(part): _key(part) for part in parts}
    for part in parts:
        key = keys[id(part)]
        if key == "content" and id(part) not in written:
            return False
        if isinstance(key, str):  # of a message, if it is one
            if hasattr(dict, key) or key in _MESSAGES_OF_LOOP:
                return False
            whole.add(id(part.node))
    first = {id(part.node) for part in parts if keys[id(part)] == 0 and id(part) in whole}
    holders = [name for name in code.find_all(nodes.Name) if name.ctx == "load"]
    return all(
        id(name) in (first | {id(loop.iter) for loop in loops})
        if name.name == "messages"
        else name.name not in names or id(name) in whole
        for name in holders
    )


def _key(part: nodes.Getattr | nodes.Getitem) -> object:
    """Return the key of a part that is taken by a fixed one, else None."""
    if isinstance(part, nodes.Getattr):
        return part.attr
    return part.arg.value if isinstance(part.arg, nodes.Const) else None
