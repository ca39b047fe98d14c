"""Where a layer's class and its forward come from."""

from __future__ import annotations

from typing import Any


def from_transformers(layer: Any) -> bool:
    """Whether `layer` is of a class of transformers' models whose forward nobody replaced."""
    kind = type(layer)
    return kind.__module__.startswith("transformers.models.") and kind.forward.__module__ == kind.__module__
