"""An objective with a running statistic, and what it does from batch to batch, worked out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from gapo.objectives import LogProbs


def drifting(logps: LogProbs, *, rate: float = 0.5) -> Any:
    """(1 - M + m)^2, with m the running mean of the margins before the batch."""
    mean = logps.running("mean", logps.mean(logps.margins), initial=0.0, rate=rate)
    return (1 - logps.margins + mean) ** 2


def drifting_gaps(logps: LogProbs) -> Any:
    """-(1 - gap + m) M, with m the running mean of the anchor gaps before the batch."""
    mean = logps.running("mean", logps.mean(logps.anchor_gaps), initial=0.0, rate=0.5)
    return (logps.anchor_gaps - mean - 1) * logps.margins


drifting_gaps.needs_anchor = True  # type: ignore[attr-defined]


def by_hand(margins: Iterable[Any], rate: float = 0.5, before: float = 0.0) -> list[dict[str, Any]]:
    """Of each batch with these margins: loss, weights (N,), and the running mean after it, in float64."""
    rows = []
    for batch in margins:
        m = [float(x) for x in batch]
        weights = np.array([2 * (1 - x + before) for x in m])
        loss = sum((1 - x + before) ** 2 for x in m) / len(m)
        before = before - rate * (before - sum(m) / len(m))
        rows.append({"loss": loss, "weights": weights, "mean": before})
    return rows
