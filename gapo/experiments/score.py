"""`gapo.runs.score` at its former address: `from gapo.experiments.score import ScoreConfig, score` goes on working."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gapo.runs.score import ScoreConfig

if TYPE_CHECKING:
    from gapo.runs.score import score

__all__ = ["ScoreConfig", "score"]


def __getattr__(name: str) -> Any:
    """`score`, when it is first asked for, since it needs PyTorch."""
    if name != "score":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gapo.runs.score import score

    return score
