"""Changes to the text of a chat template: the generation prompt that it lacks, and a fixed date."""

import json
import string
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import takewhile

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
