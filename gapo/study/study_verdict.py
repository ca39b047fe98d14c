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

    Controls do not compete, nor does what was not run at every noise. Controls that the leader does not beat are named.

    Args:
        done: the runs of the grid that did not fail.
        value: the column that is compared, a share.
    """
    flipped = done[done["rate"] > 0].dropna(subset=[value])
    methods = [arm for arm in flipped["arm"].unique() if not ARMS[arm].control]
    if not methods:
        return "No labels were flipped, so this study cannot tell which objective copes with wrong labels."
    cells = flipped.drop_duplicates(["arm", "mode", "rate"]).groupby("arm").size()
    flipped = flipped[flipped["arm"].isin(cells[cells == cells[methods].max()].index)]
    noisy = flipped[flipped["arm"].isin(methods)]
    means = noisy.groupby(["arm", "mode", "rate"])[value].mean().groupby("arm").mean().sort_values(ascending=False)
    (leader, *others), seeds = means.index, noisy["seed"].nunique()
    top = f"It ranks {100 * means[leader]:.1f} % of the test pairs correctly, averaged over all flip rates above 0"
    if not others:
        return f"Only {shown(leader)} was trained on flipped labels. {top}."
    if seeds < 2:
        return f"One seed cannot tell which objective is ahead. {shown(leader)} comes first: {top[0].lower()}{top[1:]}."
    leads = {arm: lead(differences(noisy, leader, arm, value), len(others)) for arm in others}
    level = [arm for arm in others if not leads[arm].low > 0]
    first = leads[others[0]]
    figures = (
        f"{top}. Its lead over the runner-up, {shown(others[0])}, is {_points(first.mean):.1f} points "
        f"({_points(first.low):.1f} to {_points(first.high):.1f}, {seeds} seeds)."
    )
    controls = [arm for arm in flipped["arm"].unique() if arm not in methods]
    if equal := [arm for arm in controls if not lead(differences(flipped, leader, arm, value), len(controls)).low > 0]:
        figures += f" Controls that {shown(leader)} does not beat: {_some(equal)}."
    if not level:
        return f"{shown(leader)} beats every other objective when labels are flipped. {figures}"
    if len(level) == len(others):
        return f"No objective is ahead beyond chance when labels are flipped. {shown(leader)} comes first. {figures}"
    return (
        f"{shown(leader)} comes first when labels are flipped, and beats {len(others) - len(level)} of the "
        f"{len(others)} other objectives beyond chance, but not {_some(level)}. {figures}"
    )


def _some(arms: list[str]) -> str:
    """Names of arms; of many the first few, and how many more."""
    more = f" and {len(arms) - _LISTED} more" if len(arms) > _LISTED else ""
    names = [shown(arm) for arm in arms[:_LISTED]]
    return ("; " if any("," in name for name in names) else ", ").join(names) + more


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
