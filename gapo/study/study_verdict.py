"""The first sentence of a study: who is ahead with flipped labels beyond chance, or that nobody is."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from gapo.study.arms import ARMS
from gapo.study.names import shown
from gapo.study.statistics import Interval, differences

_LISTED = 3  # names in a sentence


def verdict(done: pd.DataFrame, value: str = "accuracy") -> str:
    """The objective of the highest mean accuracy over all flip rates above 0, and whom it beats on the same flips.

    Controls do not compete, nor does what was not run at every noise.

    Args:
        done: the runs of the grid that did not fail.
        value: the column that is compared, a share.
    """
    methods = [arm for arm in dict.fromkeys(done["arm"]) if not ARMS[arm].control]
    noisy = done[(done["rate"] > 0) & done["arm"].isin(methods)].dropna(subset=[value])
    if noisy.empty:
        return "No label was flipped: this study does not tell who bears flips."
    cells = noisy.drop_duplicates(["arm", "mode", "rate"]).groupby("arm").size()
    noisy = noisy[noisy["arm"].isin(cells[cells == cells.max()].index)]
    means = noisy.groupby(["arm", "mode", "rate"])[value].mean().groupby("arm").mean().sort_values(ascending=False)
    (leader, *others), seeds = means.index, noisy["seed"].nunique()
    top = f"{100 * means[leader]:.1f} % of clean test pairs right, mean over all flip rates above 0"
    if not others:
        return f"{shown(leader)} alone was run with flipped labels: {top}."
    if seeds < 2:
        return f"Nobody can be called ahead on one seed: {shown(leader)} comes first ({top})."
    leads = {arm: lead(differences(noisy, leader, arm, value), len(others)) for arm in others}
    level = [arm for arm in others if not leads[arm].low > 0]
    beaten = len(others) - len(level)
    names = ", ".join(shown(arm) for arm in level[:_LISTED])
    names += f" and {len(level) - _LISTED} more" if len(level) > _LISTED else ""
    first = leads[others[0]]
    next_best = (
        f"{_points(first.mean):+.1f} points ({_points(first.low):.1f} to {_points(first.high):.1f}) on "
        f"{shown(others[0])}, {seeds} seeds"
    )
    if not level:
        return f"{shown(leader)} is ahead of every other objective with flipped labels: {top}; {next_best}."
    if not beaten:
        by_chance = f"{shown(leader)} comes first ({top}), and may do so by chance"
        return f"Nobody is ahead with flipped labels: {by_chance}: {next_best}."
    return (
        f"{shown(leader)} comes first with flipped labels ({top}), ahead of {beaten} of {len(others)} others, but not "
        f"beyond chance of {names}: {next_best}."
    )


def _points(share: float) -> float:
    return round(100 * share, 1) + 0.0  # no -0.0


def lead(values: np.ndarray, comparisons: int) -> Interval:
    """Mean of paired differences (n,) and Student's interval, at the level 1 - 0.05 / comparisons (Bonferroni).

    The bootstrap of `statistics` does not reach beyond the extremes of a few seeds, as such a level asks for.
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, np.nan, np.nan, n)
    half = float(stats.t.ppf(1 - 0.025 / comparisons, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)
