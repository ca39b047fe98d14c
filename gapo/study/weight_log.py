"""The weights of a run: flipped against clean pairs over time, and how well weights tell the two apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from gapo.runs.output.noise import auroc, fifths

SPANS = 8  # of a run, in which weights are averaged
_LATE = 0.5  # share of the run after which weights are judged as detectors of flips


class WeightLog:
    """Margins, weights and gaps of every pair at the moment it was trained on.

    Args:
        is_flipped: (n,) bool, of the training pairs.
    """

    def __init__(self, is_flipped: np.ndarray) -> None:
        self._is_flipped = is_flipped
        self._shares: list[np.ndarray] = []
        self._index: list[np.ndarray] = []
        self._columns: dict[str, list[np.ndarray]] = {}

    def add(
        self, share: float, index: np.ndarray, margins: np.ndarray, weights: np.ndarray, gaps: np.ndarray | None
    ) -> None:
        """One micro-batch, at this share of the run, of the pairs `index`; `gaps` is None without an anchor."""
        self._index.append(index)
        self._shares.append(np.full(len(index), share))
        for name, values in (("margin", margins), ("weight", weights), ("gap", gaps)):
            if values is not None:
                self._columns.setdefault(name, []).append(np.asarray(values, dtype=float))

    def last(self, name: str) -> np.ndarray:
        """(n,) the last value of "margin", "weight" or "gap" of each training pair; NaN for one never trained on."""
        out = np.full(len(self._is_flipped), np.nan)
        out[np.concatenate(self._index)] = np.concatenate(self._columns[name])
        return out

    def summary(self) -> dict[str, Any]:
        """Compact: means over spans of the run; fifths and AUROC (see `gapo.runs.output.noise`) over its later half.

        "fitted" is the share of pairs whose margin is above 0 as they are labelled, at the moment of their step.
        """
        share = np.concatenate(self._shares)
        columns = {name: np.concatenate(values) for name, values in self._columns.items()}
        over_time = {**columns, "fitted": (columns["margin"] > 0).astype(float)}
        span = np.minimum((share * SPANS).astype(int), SPANS - 1)
        flipped = self._is_flipped[np.concatenate(self._index)]
        summary: dict[str, Any] = {
            "over_time": {
                f"{name}_{label}": [_mean(values[(span == s) & (flipped == value)]) for s in range(SPANS)]
                for name, values in over_time.items()
                for value, label in ((False, "clean"), (True, "flipped"))
            }
        }
        late = share >= _LATE
        if flipped[late].any() and not flipped[late].all() and late.sum() >= 5:
            weights = columns["weight"][late]
            summary["fifths"] = [round(float(share), 5) for share in fifths(weights, flipped[late])]
            summary["flipped_weight_change"] = _ratio(weights[flipped[late]], weights[~flipped[late]])
            signs = {"weight": -1, "margin": -1, "gap": 1}
            for name, values in columns.items():
                summary[f"auroc_{name}"] = round(float(auroc(signs[name] * values[late], flipped[late])), 5)
        if "gap" in columns:
            summary["mean_gap"] = float(columns["gap"].mean())
            summary["mean_gap_late"] = float(columns["gap"][late].mean())
        return summary


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None


def _ratio(flipped: np.ndarray, clean: np.ndarray) -> float | None:
    """Mean of the first over mean of the second, minus 1; None where the second is 0."""
    return float(flipped.mean() / clean.mean() - 1) if clean.mean() else None
