"""Self-contained pages, readable in light and in dark: templates beside this file that extend `page.html.jinja`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def render_page(template: str, *, title: str, pictures: Sequence[str] = (), **values: Any) -> str:
    """The page `template` as text. `pictures` are SVG of `plots` and stand as they are; all else is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    values |= {"title": title, "pictures": [Markup(svg) for svg in pictures]}
    return environment.get_template(template).render(values)
