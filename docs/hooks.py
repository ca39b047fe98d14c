"""Three things that the built pages add to Markdown.

Equations become MathML, so pages load no script. SVG pictures are inlined, so their grey follows the theme.
Names of tests get line breaks, so the tables of docs/reliability.md fit the page.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.DOTALL)
_PICTURE = re.compile(r'<img alt="([^"]*)" src="[./]*(images/[^"]+\.svg)"\s*/?>')

_TEST = re.compile(r"<code>(tests/[^<]+::[^<]+)</code>")


def on_page_content(content: str, config: Any, **_: Any) -> str:
    """Rewrite one page; mkdocs calls this hook with each page's HTML."""

    def equation(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return str(convert(html.unescape(match[3]).strip(), display=display))

    def picture(match: re.Match[str]) -> str:
        svg = Path(config["docs_dir"], match[2]).read_text(encoding="utf-8").replace("#777777", "currentColor")
        return f'<span class="picture">{svg[svg.index("<svg") :]}</span>'

    def test(match: re.Match[str]) -> str:
        broken = re.sub("(_|::)", r"\1<wbr>", match[1])
        return f'<code class="test">{broken}</code>'

    return _TEST.sub(test, _PICTURE.sub(picture, _EQUATION.sub(equation, content)))
