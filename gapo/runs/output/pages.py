"""Self-contained pages, readable in light and in dark: templates that extend `page.html.jinja`, beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def render_page(template: Path, *, title: str, pictures: Sequence[str] = (), **values: Any) -> str:
    """The page of the file `template` as text. `pictures` are SVG of `plots`, inserted unescaped; all else is escaped.

    The template extends `page.html.jinja`, which is found from every folder.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    values |= {"title": title, "pictures": [Markup(svg) for svg in pictures]}
    return environment.get_template(template.name).render(values)
