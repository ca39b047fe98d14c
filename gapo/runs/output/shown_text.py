"""Texts of users as the pages show them: messages by turn, and characters that could deceive the eye made visible."""

from __future__ import annotations

import json
import re
from typing import Any

from gapo.data.messages import media_of, text_of

# Characters that no reader sees and that change what the reader does see: controls, but tabs and ends of lines; those
# that turn the direction of writing; halves of surrogate pairs, which UTF-8 cannot store.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""`text` with its unseen characters by their numbers, and with plain ends of lines.

    >>> visible("a\r\nb\u202ec")
    'a\nb⟨U+202E⟩c'
    """
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", plain)


def turns(value: str | list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(role, text) of each message; of a text, the one with the role ""."""
    if isinstance(value, str):
        return [("", visible(value))]
    return [(visible(message["role"]), visible(_said(message))) for message in value]


def as_text(value: str | list[dict[str, Any]]) -> str:
    """The turns as one text; each role stands in front where there are several."""
    parts = turns(value)
    return parts[0][1] if len(parts) == 1 else "\n\n".join(f"{role}: {text}" for role, text in parts)


def _said(message: dict[str, Any]) -> str:
    beside = [f"[{kind}]" for kind in media_of([message])]
    if calls := message.get("tool_calls"):
        beside.append(json.dumps(calls, ensure_ascii=False, default=str))
    return "\n".join(filter(None, [text_of([message]), *beside]))
