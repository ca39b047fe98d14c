"""What the weights of a run say of its flipped pairs (the paper's diagnostics at 20 % flips)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def pair_columns(steps: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The lines of steps.jsonl as flat columns, one entry for each pair seen: "step", "anchor_gaps", "weights", ..."""
    names = [name for name in steps[0] if name != "step"]
    columns = {name: np.array([v for row in steps for v in row[name]], dtype=float) for name in names}
    columns["step"] = np.array([row["step"] for row in steps for _ in row[names[0]]], dtype=float)
    return columns


def weight_diagnostics(weights: np.ndarray, is_flipped: np.ndarray) -> dict[str, float]:
    """How weights and flips go together; empty where no pair, or every pair, is flipped.

    Args:
        weights: (n,) weights.
        is_flipped: (n,) 1 or True where the label was flipped.

    Returns:
        "flipped_weight", "clean_weight": their means; "flipped_weight_change": the first over the second, minus 1;
        "flipped_share", and the same "in_lowest_fifth" and "in_highest_fifth" of the weights.
    """
    flipped = np.asarray(is_flipped, dtype=bool)
    if flipped.all() or not flipped.any():
        return {}
    ranked = flipped[np.argsort(weights, kind="stable")]
    fifth = max(1, len(ranked) // 5)
    on_flipped, on_clean = float(weights[flipped].mean()), float(weights[~flipped].mean())
    return {
        "flipped_weight": on_flipped,
        "clean_weight": on_clean,
        "flipped_weight_change": on_flipped / on_clean - 1,
        "flipped_share": float(flipped.mean()),
        "flipped_share_in_lowest_fifth": float(ranked[:fifth].mean()),
        "flipped_share_in_highest_fifth": float(ranked[-fifth:].mean()),
    }
