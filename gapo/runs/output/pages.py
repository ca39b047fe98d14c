"""Self-contained pages, readable in light and in dark: templates that extend `page.html.jinja`, beside this file.

Nothing is loaded from anywhere: each page carries a content security policy that forbids it. Of scripts it allows the
page's own alone, by its digest, so that text of users cannot become one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src {}; base-uri 'none'; form-action 'none'"


def render_page(
    template: Path,
    *,
    title: str,
    pictures: Sequence[str] = (),
    script: str | None = None,
    style: str = "",
    **values: Any,
) -> str:
    """The page of the file `template` as text.

    The template extends `page.html.jinja`, which is found from every folder. `pictures` are SVG of `plots`. They,
    `script` (JavaScript) and `style` (CSS) are inserted unescaped; all else is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    values |= {"title": title, "pictures": [Markup(svg) for svg in pictures], "style": Markup(style)}
    values |= {"script": Markup(script or ""), "policy": _POLICY.format(_source(script))}
    text = environment.get_template(template.name).render(values)
    return text.encode("utf-8", "replace").decode()  # names of files may hold bytes that are no text


def _source(script: str | None) -> str:
    """What a content security policy calls this one script."""
    if script is None:
        return "'none'"
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def share(value: float, digits: int = 1) -> str:
    """A share in percent, as in running text.

    >>> share(0.5), share(0.7142, 0)
    ('50.0 %', '71 %')
    """
    return f"{100 * value:.{digits}f} %"
