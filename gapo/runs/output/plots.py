"""The pictures of a run, as SVG text in the page's own text colour, light or dark.

Matplotlib knows no `currentColor`. So everything that is ink is drawn in a colour that nothing else has, which is then
replaced in the SVG.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gapo.runs.output.noise import pair_columns

# Okabe and Ito's palette, which colour-blind readers can tell apart, on light and on dark.
BLUE, ORANGE, GREEN = "#3b8fd0", "#d55e00", "#009e73"
_INK = "#010203"  # replaced by the page's own text colour
_BINS = 40
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Row = dict[str, Any]


def figure(title: str, xlabel: str, ylabel: str, draw: Callable[[Any], None]) -> str:
    """One picture as SVG: `draw(axes)` puts the data in."""
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style = {**ink, "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10, "legend.frameon": False}
    style["text.parse_math"] = False  # names of models may hold dollars
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = drawing.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        svg = _svg(drawing)
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def _svg(drawing: Figure) -> str:
    """The figure, laid out once: `savefig` would draw a figure that has a layout twice."""
    FigureCanvasSVG(drawing)
    layout = drawing.get_layout_engine()
    assert layout is not None
    layout.execute(drawing)
    drawing.set_layout_engine("none")
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def reward_accuracy(metrics: Sequence[Row]) -> str:
    """Share of pairs with a positive margin: training labels as they are, held-out pairs."""

    def draw(axes: Any) -> None:
        _line(axes, metrics, "rewards/accuracies", "training labels, flips and all", BLUE, alpha=0.7)
        _line(axes, metrics, "eval_rewards/accuracies", "held-out pairs", ORANGE, marker="o")
        axes.axhline(0.5, color=_INK, alpha=0.3, linewidth=0.8)

    return figure("Reward accuracy", "step", "share of pairs", draw)


def margins(metrics: Sequence[Row]) -> str:
    """Mean reward margin, beta times the margin of the log-probabilities."""

    def draw(axes: Any) -> None:
        _line(axes, metrics, "rewards/margins", "training pairs", BLUE, alpha=0.7)
        _line(axes, metrics, "eval_rewards/margins", "held-out pairs", ORANGE, marker="o")

    return figure("Reward margins", "step", "beta x nats per token", draw)


def logps(metrics: Sequence[Row]) -> str:
    """Mean log-probability of chosen and rejected answers of the held-out pairs."""

    def draw(axes: Any) -> None:
        _line(axes, metrics, "eval_logps/chosen", "chosen", GREEN, marker="o")
        _line(axes, metrics, "eval_logps/rejected", "rejected", ORANGE, marker="o")

    return figure("Log-probabilities, held-out pairs", "step", "nats per token", draw)


def drift(metrics: Sequence[Row]) -> list[str]:
    """How far the policy is from where it started: KL, margins of two fixed samples, lengths of responses."""

    def kl(axes: Any) -> None:
        _line(axes, metrics, "drift/kl", "held-out answers", BLUE, marker="o")

    def margins_of_samples(axes: Any) -> None:
        _line(axes, metrics, "drift/train_margin", "training pairs", BLUE, marker="o")
        _line(axes, metrics, "drift/held_out_margin", "held-out pairs", ORANGE, marker="o")

    def lengths(axes: Any) -> None:
        _line(axes, metrics, "drift/response_length", "mean over held-out prompts", GREEN, marker="o")
        axes.set_ylim(bottom=0)

    return [
        figure("KL to the starting policy", "step", "nats per token", kl),
        figure("Margins of two fixed samples", "step", "nats per token", margins_of_samples),
        figure("Length of generated responses", "step", "tokens", lengths),
    ]


def spread_over_time(steps: Sequence[Row], name: str, title: str, ylabel: str) -> str:
    """Quantiles of a per-pair column over the steps: median, middle half, middle nine tenths."""

    def draw(axes: Any) -> None:
        columns = pair_columns(steps)
        middles, groups = _binned(columns["step"], columns[name])
        low, lower, median, upper, high = np.array([np.quantile(group, _QUANTILES) for group in groups]).T
        axes.fill_between(middles, low, high, color=BLUE, alpha=0.2, linewidth=0, label="5 % to 95 %")
        axes.fill_between(middles, lower, upper, color=BLUE, alpha=0.4, linewidth=0, label="25 % to 75 %")
        axes.plot(middles, median, color=BLUE, label="median")

    return figure(title, "step", ylabel, draw)


def flipped_weights(steps: Sequence[Row]) -> str:
    """Mean weight of flipped and of clean pairs over the steps, with two standard errors."""

    def draw(axes: Any) -> None:
        columns = pair_columns(steps)
        for value, label, colour in ((0, "clean pairs", BLUE), (1, "flipped pairs", ORANGE)):
            chosen = columns["is_flipped"] == value
            middles, groups = _binned(columns["step"][chosen], columns["weights"][chosen])
            mean = np.array([np.mean(group) for group in groups])
            error = np.array([2 * np.std(group) / np.sqrt(len(group)) for group in groups])
            axes.plot(middles, mean, color=colour, label=label)
            axes.fill_between(middles, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)

    return figure("Weight of flipped and of clean pairs", "step", "mean weight", draw)


def flipped_histogram(steps: Sequence[Row]) -> str:
    """Distribution of the weights of flipped and of clean pairs in the last quarter of the steps."""

    def draw(axes: Any) -> None:
        columns = pair_columns(steps)
        late = columns["step"] >= np.quantile(columns["step"], 0.75)
        edges = np.histogram_bin_edges(columns["weights"][late], bins=_BINS)
        for value, label, colour in ((0, "clean pairs", BLUE), (1, "flipped pairs", ORANGE)):
            chosen = columns["weights"][late & (columns["is_flipped"] == value)]
            if len(chosen):
                axes.hist(chosen, bins=edges, density=True, histtype="stepfilled", alpha=0.5, color=colour, label=label)

    return figure("Weights in the last quarter of the run", "weight", "density", draw)


def _line(axes: Any, metrics: Sequence[Row], name: str, label: str, colour: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, markersize=3, **style)


def _binned(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Middle step of each of at most `_BINS` spans of steps that hold values, and the values in it."""
    edges = np.linspace(step.min(), step.max() + 1, min(_BINS, len(np.unique(step))) + 1)
    bins = np.digitize(step, edges)
    present = np.unique(bins)
    return np.array([step[bins == b].mean() for b in present]), [values[bins == b] for b in present]
