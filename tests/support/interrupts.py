"""Ctrl-C at a chosen line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def interrupt_at(line: int, codes: set[Any]) -> Callable[..., Any]:
    """A trace function that raises KeyboardInterrupt at the so-many-th line that is run of these functions."""
    seen = [0]

    def at_line(frame: Any, event: str, _: Any) -> Any:
        seen[0] += event == "line"
        if seen[0] == line and event == "line":
            raise KeyboardInterrupt
        return at_line

    return lambda frame, event, _: at_line if frame.f_code in codes else None
