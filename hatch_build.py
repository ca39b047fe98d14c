"""README.md as a package index shows it: there, a relative link leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def for_index(text: str, repository: str | None) -> str:
    """Markdown with absolute links. Without the repository's address a link becomes its words, and a picture goes."""

    def absolute(match: re.Match[str]) -> str:
        picture, words, path = match.groups()
        if repository is None:
            return "" if picture else words
        return f"{picture}[{words}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{path})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # every second one is code
    return "".join(part if i % 2 else _RELATIVE.sub(absolute, part) for i, part in enumerate(parts))


class ReadmeHook(MetadataHookInterface):
    """Hatchling's hook: the readme of the metadata, from README.md and the Repository of `project.urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme`."""
        text = Path(self.root, "README.md").read_text("utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_index(text, repository)}
