"""Pages that need nothing but themselves: Jinja templates beside the code that fills them, and the look that they share."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def data_uri(content: bytes, mime: str) -> str:
    """A file's content, of the type `mime`, as an address that has all of it."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def render_page(template: Path, functions: dict[str, Callable[..., Any]], **values: Any) -> str:
    """The page that `template` makes of `values`; texts are escaped, and a name that it lacks is an error.

    Args:
        template: a file; its styles begin with ``{% include 'look.css.jinja' %}``.
        functions: what the template, macros included, may call or look up besides.
        values: what it shows.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(functions)
    return environment.get_template(template.name).render(values)
