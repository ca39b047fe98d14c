"""What `gapo train`, `gapo score` and `gapo study` raise for settings that cannot be used; no parser is behind it."""

from __future__ import annotations


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
