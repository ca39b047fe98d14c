"""`gapo score`: the margin, the anchor margin, the gap and the weight of each pair, under one model or several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gapo.runs.score.score_config import ScoreConfig

if TYPE_CHECKING:
    from gapo.runs.score.flow import score

__all__ = ["ScoreConfig", "score"]


def __getattr__(name: str) -> Any:
    """`score`, when it is first asked for: it needs PyTorch, and the settings and `gapo score --help` do not."""
    if name != "score":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gapo.runs.score.flow import score

    return score
