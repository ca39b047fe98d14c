"""What `gapo train`, `gapo score` and `gapo study` raise for settings that cannot be used; no parser is behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration or command line cannot be used."""


def require_seed(name: str, seed: int) -> None:
    """Raise ValueError unless every generator takes `seed`."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name} must be in [0, 2**32), got {seed!r}")


def require_limit(limit: int | None) -> None:
    """Raise ValueError for a number of rows that is none."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1, or none for all pairs, got {limit!r}")


def changes(names: Iterable[str], earlier: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings among `names` that differ, each with its earlier and its new value; empty where none does."""
    differing = [name for name in names if earlier.get(name) != new.get(name)]
    return ", ".join(f"{name}: {earlier.get(name)!r} -> {new.get(name)!r}" for name in differing)
