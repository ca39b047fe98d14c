"""Means with intervals over seeds, and paired differences: arms are compared on the same seeds and flips, never alone.

Seeds are few. The plain percentile bootstrap of five numbers covers about 83 % where it says 95; so its levels are
widened by Student's t and sqrt(n / (n - 1)) (the "expanded percentile" interval, Hesterberg, arXiv 1411.5279).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

_DRAWS = 4000


class Interval(NamedTuple):
    """A mean and its interval; NaN ends for a single value."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(values: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of `values` (n,), one for each seed, with its expanded percentile interval.

    Raises:
        ValueError: there is no value.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value, got none")
    if n == 1:
        return Interval(float(values[0]), np.nan, np.nan, 1)
    quantile = stats.t.ppf((1 + level) / 2, n - 1) * np.sqrt(n / (n - 1))
    tail = stats.norm.cdf(-quantile)
    means = values[np.random.default_rng(seed).integers(n, size=(_DRAWS, n))].mean(1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high), n)


def intervals(frame: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """`bootstrap` of the column `value` over the seeds in each group of `by`: "mean", "low", "high", "n"."""
    rows = []
    for key, group in frame.dropna(subset=[value]).groupby(by, sort=False):
        rows.append({**dict(zip(by, key, strict=True)), **bootstrap(_by_seed(group, value))._asdict()})
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])


class Error(NamedTuple):
    """A mean and its standard error over n seeds; NaN for a single value."""

    mean: float
    error: float
    n: int


def standard_error(values: np.ndarray) -> Error:
    """Mean of `values` (n,), one for each seed, and the standard error of that mean: deviation / sqrt(n)."""
    n = len(values)
    return Error(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else np.nan, n)


def detectable(error: float, n: int, *, power: float = 0.8, level: float = 0.95) -> float:
    """The true difference that a paired t test over n seeds, with this standard error, finds with this power."""
    return float((stats.t.ppf((1 + level) / 2, n - 1) + stats.t.ppf(power, n - 1)) * error)


def paired(frame: pd.DataFrame, arm: str, other: str, value: str, where: dict[str, Any] | None = None) -> Interval:
    """Interval of `value` of `arm` minus that of `other`, over seeds; see `differences`."""
    return bootstrap(differences(frame, arm, other, value, where))


def differences(
    frame: pd.DataFrame, arm: str, other: str, value: str, where: dict[str, Any] | None = None
) -> np.ndarray:
    """`value` of `arm` minus that of `other`, (n,), one for each seed: the mean over the noises that both have.

    Args:
        frame: rows with "arm", "mode", "rate", "seed" and `value`.
        arm: name of the first.
        other: name of the second.
        value: name of a column.
        where: columns and the values that they must have, such as {"mode": "random"}.

    Raises:
        ValueError: no seed and noise has both.
    """
    for name, wanted in (where or {}).items():
        frame = frame[frame[name] == wanted]
    wide = frame.pivot_table(index=["seed", "mode", "rate"], columns="arm", values=value)
    if not {arm, other} <= set(wide.columns):
        raise ValueError(f"there is no run of {arm!r} and {other!r} on the same seed and flips")
    difference = (wide[arm] - wide[other]).dropna()
    if difference.empty:
        raise ValueError(f"there is no run of {arm!r} and {other!r} on the same seed and flips")
    return np.asarray(difference.groupby("seed").mean())


def _by_seed(group: pd.DataFrame, value: str) -> np.ndarray:
    return group.groupby("seed")[value].mean().to_numpy()
