"""The figures of a study; each reads without the text around it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from gapo.runs.output.plots import BLUE, GREEN, ORANGE, at_least, coin_toss, figure
from gapo.study.arms import ARMS
from gapo.study.names import shown
from gapo.study.statistics import intervals
from gapo.study.weight_log import SPANS

# Arms in colour; the others are thin grey lines behind them. Colours of Okabe and Ito, as in `plots`.
_COLOURS = {"gapo": ORANGE, "simpo": BLUE, "dpo": GREEN, "dr_dpo": "#cc79a7", "ropo": "#a08000"}
_CONTROL_COLOURS = {
    "gapo": ORANGE, "gapo-rho0": BLUE, "gapo-gaussian": GREEN, "gapo-margin": "#cc79a7", "gapo-l2": "#a08000",
    "gapo-first-order": "#7a5cc0",
}  # fmt: skip
_PALETTE = [*list(_CONTROL_COLOURS.values())[1:], "#b0413e", "#2aa198", "#e0a030"]
_GREY = "#8a929b"
_POINTS = 10  # the least span of an axis of accuracies without the line of 50 %, in points
_RATIO = 0.2  # the least span of an axis of weights over weights


def accuracy(runs: pd.DataFrame, mode: str, title: str, ylabel: str, value: str = "accuracy") -> str:
    """Accuracy against flip rate: GAPO and the best known in colour with bands, the others in grey."""
    table = intervals(runs[runs["mode"] == mode], ["arm", "rate"], value)
    methods = [arm for arm in table["arm"].unique() if not ARMS[arm].control]
    # Weighted by the gap, an objective has its own colour, dashed.
    coloured = _COLOURS | {f"gapo+{arm}": colour for arm, colour in _COLOURS.items()}

    def draw(axes: Any) -> None:
        for arm in sorted(methods, key=lambda arm: arm in coloured):
            _band(axes, table[table["arm"] == arm], shown(arm), coloured.get(arm), dashed="+" in arm)
        if others := len(set(methods) - set(coloured)):
            axes.plot([], [], color=_GREY, linewidth=0.8, label=f"{others} others")
        coin_toss(axes, 100)

    return figure(title, "flipped training labels, %", ylabel, draw)


def family(runs: pd.DataFrame, mode: str, arms: list[str], title: str, ylabel: str) -> str:
    """Accuracy of `arms` against flip rate, at the rates where all of them were run; "" where there is none."""
    runs = runs[(runs["mode"] == mode) & runs["arm"].isin(arms)]
    runs = runs[runs.groupby("rate")["arm"].transform("nunique") == len(arms)]
    if runs.empty:
        return ""
    table = intervals(runs, ["arm", "rate"], "accuracy")
    colours = _coloured([shown(arm) for arm in arms])
    return _against_rate(table, dict(zip(arms, colours, strict=True)), title, ylabel)


def valuation(table: pd.DataFrame, title: str) -> str:
    """Accuracy of SimPO on the pairs with the lowest, random and highest gaps, against the share of flips."""
    parts = {"lowest": GREEN, "random": BLUE, "highest": ORANGE}
    lines = {part: (f"{part} gaps" if part != "random" else "random pairs", parts[part]) for part in parts}
    return _against_rate(table, lines, title, "reward accuracy, clean test pairs, %")


def _against_rate(table: pd.DataFrame, lines: dict[str, tuple[str, str]], title: str, ylabel: str) -> str:
    """Bands for {arm: (label, colour)} against the flip rate; a point with its interval for each where there is one."""
    lines = {arm: line for arm, line in lines.items() if arm in set(table["arm"])}
    rates = table["rate"].unique()

    def bands(axes: Any) -> None:
        for arm, (label, colour) in lines.items():
            _band(axes, table[table["arm"] == arm], label, colour)
        coin_toss(axes, 100)

    def points(axes: Any) -> None:
        for height, (arm, (_, colour)) in enumerate(reversed(lines.items())):
            mean, low, high = 100 * table[table["arm"] == arm].iloc[0][["mean", "low", "high"]].astype(float)
            axes.plot([low, high], [height, height], color=colour)
            axes.plot(mean, height, "o", color=colour, markersize=5)
        axes.margins(y=0.2)
        axes.set_yticks(range(len(lines)), [label for label, _ in reversed(lines.values())])
        at_least(axes, _POINTS, along="x")

    if len(rates) > 1:
        return figure(title, "flipped training labels, %", ylabel, bands)
    return figure(f"{title}, {100 * rates[0]:g} % flips", ylabel, "", points)


def _band(axes: Any, table: pd.DataFrame, label: str, colour: str | None, dashed: bool = False) -> None:
    """A line with its band; thin and grey without a colour, and without the band if dashed."""
    x = 100 * table["rate"]
    if colour is None:
        axes.plot(x, 100 * table["mean"], color=_GREY, linewidth=0.8)
        return
    style = "--" if dashed else "-"
    axes.plot(x, 100 * table["mean"], style, color=colour, marker="o", markersize=3, label=label)
    if not dashed:
        axes.fill_between(x, 100 * table["low"], 100 * table["high"], color=colour, alpha=0.18, linewidth=0)


def weights_over_time(groups: dict[str, list[dict[str, Any]]], title: str) -> str:
    """Mean weight of flipped pairs over that of clean ones through the run: a line for each {label: records}."""

    def draw(axes: Any) -> None:
        for label, colour in _coloured(groups):
            curves = [_ratio(record["over_time"]) for record in groups[label]]
            middles = (np.arange(SPANS) + 0.5) / SPANS
            axes.plot(100 * middles, pd.DataFrame(curves).mean(), marker="o", markersize=3, color=colour, label=label)
        axes.axhline(1, color=_GREY, linewidth=0.8)
        at_least(axes, _RATIO)

    return figure(title, "share of the run, %", "weight of flipped / weight of clean pairs", draw)


def _ratio(over_time: dict[str, list[float | None]]) -> np.ndarray:
    flipped, clean = (np.array(over_time[f"weight_{name}"], dtype=float) for name in ("flipped", "clean"))
    return np.divide(flipped, clean, out=np.full(SPANS, np.nan), where=clean != 0)


def fifths(groups: dict[str, list[dict[str, Any]]], rate: float, title: str) -> str:
    """Share of flipped pairs in each fifth of the weights, {label: records}; the line is what chance gives."""

    def draw(axes: Any) -> None:
        width = 0.8 / len(groups)
        for place, (label, colour) in enumerate(_coloured(groups)):
            shares = 100 * np.mean([record["fifths"] for record in groups[label]], 0)
            axes.bar(np.arange(5) + (place - (len(groups) - 1) / 2) * width, shares, width, color=colour, label=label)
        axes.axhline(100 * rate, color=_GREY, linewidth=0.8)
        axes.set_xticks(range(5), ["lowest", "second", "third", "fourth", "highest"])
        at_least(axes, 20, bottom=0)

    return figure(title, "fifth of the weights", "flipped pairs in it, %", draw)


def _coloured(labels: Iterable[str]) -> list[tuple[str, str]]:
    """(label, colour): an arm's own, else the next of the palette."""
    colours = {shown(arm): colour for arm, colour in {**_COLOURS, **_CONTROL_COLOURS}.items()}
    labels = list(labels)
    own = [colours[label] for label in labels if label in colours]
    palette = itertools.cycle([colour for colour in _PALETTE if colour not in own] or _PALETTE)
    return [(label, colours.get(label) or next(palette)) for label in labels]


def bars(values: dict[str, Any], title: str, label: str) -> str:
    """One horizontal bar for each arm: {name: (mean, low, high)}."""

    def draw(axes: Any) -> None:
        names = list(values)[::-1]
        means, low, high = (np.array([values[name][place] for name in names], dtype=float) for place in range(3))
        colours = [ORANGE if name == shown("gapo") else BLUE for name in names]
        errors = np.nan_to_num([np.maximum(means - low, 0), np.maximum(high - means, 0)])
        # As lists: Matplotlib 3.9 takes an array of one bar's errors for a number, and NumPy warns.
        axes.barh(names, means, xerr=errors.tolist(), color=colours, ecolor=_GREY, alpha=0.85)
        axes.tick_params(axis="y", labelsize=9)
        axes.margins(y=0.01)

    return figure(title, label, "", draw, height=max(3.6, 0.2 * len(values) + 0.8))


def curve(table: pd.DataFrame, x: str, title: str, xlabel: str, notes: dict[float, str] | None = None) -> str:
    """Accuracy against a setting with its band; `notes` {x: text} label the points."""

    def draw(axes: Any) -> None:
        places = np.arange(len(table))
        axes.plot(places, 100 * table["mean"], color=ORANGE, marker="o", markersize=3)
        axes.fill_between(places, 100 * table["low"], 100 * table["high"], color=ORANGE, alpha=0.18, linewidth=0)
        axes.set_xticks(places, [f"{value:g}" + (f"\n{notes[value]}" if notes else "") for value in table[x]])
        at_least(axes, _POINTS)

    return figure(title, xlabel, "reward accuracy, clean test pairs, %", draw)
