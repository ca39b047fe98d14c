"""Do the weights of a run show which of its pairs are flipped? The paper's diagnostics, and the AUROC of a score.

Ties are common: at rho 0 all weights are equal. So equal values have no order among themselves, neither in the fifths
of the weights nor in the AUROC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FIFTHS = 5


def pair_columns(steps: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The lines of steps.jsonl as flat columns, one entry for each pair seen: "step", "anchor_gaps", "weights", ..."""
    names = [name for name in steps[0] if name != "step"]
    columns = {name: np.array([v for row in steps for v in row[name]], dtype=float) for name in names}
    columns["step"] = np.array([row["step"] for row in steps for _ in row[names[0]]], dtype=float)
    return columns


def weight_diagnostics(weights: np.ndarray, is_flipped: np.ndarray) -> dict[str, float]:
    """How weights and flips go together; empty where no pair, or every pair, is flipped, or there are fewer than five.

    Args:
        weights: (n,) weights.
        is_flipped: (n,) 1 or True where the label was flipped.

    Returns:
        "flipped_weight", "clean_weight": their means; "flipped_weight_change": the first over the second, minus 1;
        "flipped_share", and the same "in_lowest_fifth" and "in_highest_fifth" of the weights.
    """
    flipped = np.asarray(is_flipped, dtype=bool)
    if flipped.all() or not flipped.any() or len(flipped) < FIFTHS:
        return {}
    shares = fifths(weights, flipped)
    on_flipped, on_clean = float(weights[flipped].mean()), float(weights[~flipped].mean())
    return {
        "flipped_weight": on_flipped,
        "clean_weight": on_clean,
        "flipped_weight_change": on_flipped / on_clean - 1,
        "flipped_share": float(flipped.mean()),
        "flipped_share_in_lowest_fifth": shares[0],
        "flipped_share_in_highest_fifth": shares[-1],
    }


def fifths(weights: np.ndarray, is_flipped: np.ndarray) -> list[float]:
    """Share of flipped pairs in each fifth of the weights, the lowest first; sizes differ by one pair at most.

    Pairs of equal weight have no order: each counts for the share of flips among them, so that equal weights give five
    equal shares in any order of the rows.

    Args:
        weights: (n,) weights, n >= 5.
        is_flipped: (n,) 1 or True where the label was flipped.

    Raises:
        ValueError: shapes differ, or there are fewer than five pairs.
    """
    weights, flipped = _known(weights, is_flipped)
    if len(weights) < FIFTHS:
        raise ValueError(f"fifths need at least {FIFTHS} pairs, got {len(weights)}")
    _, rank = np.unique(weights, return_inverse=True)
    share = np.bincount(rank, flipped) / np.bincount(rank)
    return [float(part.mean()) for part in np.array_split(share[np.sort(rank)], FIFTHS)]


def auroc(score: np.ndarray, is_flipped: np.ndarray) -> float:
    """Chance that a flipped pair scores higher than a clean one, ties counting half: 0.5 is chance, 1 is perfect.

    The area under the ROC curve of `score` as a detector of flips. Anchor gaps detect as they are, weights negated.

    Args:
        score: (n,) numbers, higher where a flip is suspected.
        is_flipped: (n,) 1 or True where the label was flipped.

    Raises:
        ValueError: shapes differ, or no pair, or every pair, is flipped.
    """
    score, flipped = _known(score, is_flipped)
    positives = int(flipped.sum())
    if not 0 < positives < len(flipped):
        raise ValueError(f"auroc needs flipped and clean pairs, got {positives} flipped of {len(flipped)}")
    _, tied, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[tied]  # from 1; the mean one of those that are tied
    above = rank[flipped].sum() - positives * (positives + 1) / 2  # Mann and Whitney's U
    return float(above / (positives * (len(flipped) - positives)))


def beyond_a_coin_toss(accuracy: float, n: int) -> bool:
    """Whether an accuracy on n pairs is over 0.5 by more than two standard deviations of a coin's."""
    return bool(accuracy - 0.5 > 1 / np.sqrt(max(n, 1)))


def chance(is_flipped: np.ndarray) -> float:
    """Two standard deviations of the AUROC of a score that knows nothing: 19 times in 20 it is within 0.5 +- this.

    Args:
        is_flipped: (n,) True where the label was flipped.
    """
    flipped = int(np.sum(is_flipped))
    clean = len(is_flipped) - flipped
    return 2 * float(np.sqrt((flipped + clean + 1) / (12 * flipped * clean)))  # of Mann and Whitney's U


def _known(values: np.ndarray, is_flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, flipped = np.asarray(values, dtype=float), np.asarray(is_flipped, dtype=bool)
    if values.ndim != 1 or values.shape != flipped.shape:
        raise ValueError(f"values and is_flipped must be (n,) both; got {values.shape} and {flipped.shape}")
    return values, flipped
