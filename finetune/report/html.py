"""What every page has in common: how its template is filled in, and how it is put in its place.

Floor 1.
"""

import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from finetune.errors import UserError

HERE = Path(__file__).parent


def fill(template: str, *, styles: tuple[str, ...], **values: Any) -> str:
    """The page from a template of this folder, with `styles` put into it; a value that the template asks for has to be there."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    css = Markup("\n".join((HERE / name).read_text(encoding="utf-8") for name in styles))
    return templates.get_template(template).render(css=css, **values)


def write_page(page: str, target: Path) -> Path:
    """Put the page in its place, whole or not at all. Raises UserError where it cannot be written."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"the page {target} cannot be written: {error.strerror}") from error
    return target
