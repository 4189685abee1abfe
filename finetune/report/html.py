"""What every page has in common: how its template is filled in, and how its file is written."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from finetune.run.files import write_text

_HERE = Path(__file__).parent


def fill_template(template: str, *, styles: tuple[str, ...], **values: Any) -> str:
    """Return the page that a template of this folder gives, with the files `styles` put into it.

    Every value that the template asks for must be given.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    css = Markup("\n".join((_HERE / name).read_text(encoding="utf-8") for name in styles))
    return templates.get_template(template).render(css=css, **values)


def write_page(page: str, target: Path) -> Path:
    """Write the page to `target`, whole or not at all, and return `target`.

    Raises UserError if it cannot be written.
    """
    write_text(target, page)
    return target
