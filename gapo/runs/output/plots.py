"""The pictures of a run, as SVG text in the page's own text colour, light or dark.

Matplotlib knows no `currentColor`. So everything that is ink is drawn in a colour that nothing else has, which is then
replaced in the SVG. Axes have a least span, so that noise does not look like a trend; legends stand below the axes.
"""

from __future__ import annotations

import html
import io
import textwrap
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
_LINE = 0.22  # inches of a line of a legend
_LOG_ODDS = 0.5  # the least span of an axis of reward margins: 0.5 moves a chance of 50 % to 62 %
_NATS = 0.2  # the least span of an axis of log-probabilities and margins, nats per token
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Row = dict[str, Any]


def figure(title: str, xlabel: str, ylabel: str, draw: Callable[[Any], None], *, height: float = 3.6) -> str:
    """One picture as SVG: `draw(axes)` puts the data in; `height` in inches, beside a width of 6.4."""
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style = {**ink, "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 11, "legend.frameon": False}
    style["text.parse_math"] = False  # names of models may hold dollars
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(6.4, height), layout="constrained")
        axes = drawing.subplots()
        axes.set(xlabel=xlabel, ylabel=textwrap.fill(ylabel, int(11 * height)))
        drawing.suptitle(textwrap.fill(title, 56), x=0.01, ha="left", fontsize="large")  # the axes may begin far right
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        if labels := axes.get_legend_handles_labels()[1]:
            columns = 1 + (max(map(len, labels)) < 34) + (max(map(len, labels)) < 18)
            drawing.set_figheight(height + _LINE * max(0, -(-len(labels) // columns) - 1))
            drawing.legend(loc="outside lower center", ncols=columns)
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


def at_least(axes: Any, span: float, *, bottom: float | None = None, along: str = "y") -> None:
    """Let the axis ("x" or "y") span at least `span` around what it shows, or from `bottom` up."""
    low, high = getattr(axes, f"get_{along}lim")()
    more = max(0.0, span - (high - low)) / 2
    ends = (low - more, high + more) if bottom is None else (bottom, max(high, bottom + span))
    getattr(axes, f"set_{along}lim")(*ends)


def coin_toss(axes: Any, whole: float = 1.0) -> None:
    """The line of an accuracy that is chance, 50 %, on an axis that shows a fifth of all accuracies or more."""
    axes.axhline(0.5 * whole, color=_INK, alpha=0.7, linewidth=1, linestyle=":", label="coin toss, 50 %")
    at_least(axes, 0.2 * whole)


def histogram(
    title: str, unit: str, values: np.ndarray, is_flipped: np.ndarray | None, span: tuple[float, float] | float
) -> str:
    """Distribution of values (n,): of all pairs in pairs, or of clean and of flipped ones in % of each group.

    Args:
        title: of the picture.
        unit: of the values.
        values: (n,) values; there may be none.
        is_flipped: (n,) True where the label was flipped, or None where that is not known.
        span: the ends of the axis, or the least that it spans around the values.
    """

    def draw(axes: Any) -> None:
        edges = np.linspace(*_ends(values, span), int(np.clip(len(values) // 5, 10, _BINS)) + 1)
        for group, label, colour in groups(is_flipped, len(values)):
            share = np.full(group.sum(), 1.0 if is_flipped is None else 100 / max(group.sum(), 1))
            style = {"histtype": "stepfilled", "alpha": 0.5, "color": colour, "label": label or None}
            axes.hist(values[group], bins=edges, weights=share, **style)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.get_major_locator().set_params(integer=is_flipped is None)

    return figure(title, unit, "pairs" if is_flipped is None else "% of each group", draw)


def _ends(values: np.ndarray, span: tuple[float, float] | float) -> tuple[float, float]:
    if isinstance(span, tuple):
        low, high = min(span[0], *values), max(span[1], *values)
        return low, high if high > low else low + 1  # all weights 0
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    more = max(0.0, span - (high - low)) / 2
    return low - more, high + more


def groups(is_flipped: np.ndarray | None, n: int) -> list[tuple[np.ndarray, str, str]]:
    """(which pairs (n,), their name, their colour): clean and flipped ones, or all of them without labels."""
    if is_flipped is None:
        return [(np.ones(n, dtype=bool), "", BLUE)]
    return [(~is_flipped, "clean pairs", BLUE), (is_flipped, "flipped pairs", ORANGE)]


def fifths(shares: Sequence[float], overall: float, title: str, ylabel: str) -> str:
    """A bar for each fifth of the weights, the lowest first, and the line of `overall`; shares of 1."""

    def draw(axes: Any) -> None:
        names = ["lowest", "second", "third", "fourth", "highest"]
        bars = axes.bar(names, [100 * share for share in shares], color=ORANGE, alpha=0.7, width=0.7)
        axes.bar_label(bars, fmt="%.1f")
        axes.axhline(100 * overall, color=BLUE, linewidth=1.2, label="all pairs")
        axes.margins(y=0.1)
        at_least(axes, 20, bottom=0)

    return figure(title, "fifth of the weights", ylabel, draw)


def reward_accuracy(metrics: Sequence[Row]) -> str:
    """Share of pairs with a positive margin: training labels as they are, held-out pairs."""

    def draw(axes: Any) -> None:
        _line(axes, metrics, "rewards/accuracies", "training labels, flips and all", BLUE, alpha=0.7)
        _line(axes, metrics, "eval_rewards/accuracies", "held-out pairs", ORANGE, marker="o")
        coin_toss(axes)

    return figure("Reward accuracy", "step", "share of pairs", draw)


def margins(metrics: Sequence[Row]) -> str:
    """Mean reward margin, beta times the margin of the log-probabilities: how sure the policy is, in log-odds."""

    def draw(axes: Any) -> None:
        _line(axes, metrics, "rewards/margins", "training pairs", BLUE, alpha=0.7)
        _line(axes, metrics, "eval_rewards/margins", "held-out pairs", ORANGE, marker="o")
        at_least(axes, _LOG_ODDS)

    return figure("Reward margins", "step", "beta x nats per token", draw)


def logps(metrics: Sequence[Row]) -> str:
    """Mean log-probability of chosen and rejected answers of the held-out pairs."""

    def draw(axes: Any) -> None:
        _line(axes, metrics, "eval_logps/chosen", "chosen", GREEN, marker="o")
        _line(axes, metrics, "eval_logps/rejected", "rejected", ORANGE, marker="o")
        at_least(axes, _NATS)

    return figure("Log-probabilities, held-out pairs", "step", "nats per token", draw)


def drift(metrics: Sequence[Row]) -> list[str]:
    """How far the policy is from where it started: KL, margins of two fixed samples, lengths of responses."""

    def kl(axes: Any) -> None:
        _line(axes, metrics, "drift/kl", "held-out answers", BLUE, marker="o")
        at_least(axes, _NATS / 10, bottom=0)

    def margins_of_samples(axes: Any) -> None:
        _line(axes, metrics, "drift/train_margin", "training pairs", BLUE, marker="o")
        _line(axes, metrics, "drift/held_out_margin", "held-out pairs", ORANGE, marker="o")
        at_least(axes, _NATS)

    def lengths(axes: Any) -> None:
        _line(axes, metrics, "drift/response_length", "mean over held-out prompts", GREEN, marker="o")
        axes.set_ylim(bottom=0)

    return [
        figure("KL to the starting policy", "step", "nats per token", kl),
        figure("Margins of two fixed samples", "step", "nats per token", margins_of_samples),
        figure("Length of generated responses", "step", "tokens", lengths),
    ]


def gaps_over_time(steps: Sequence[Row], beta: float) -> str:
    """Quantiles of the anchor gaps over the steps, on an axis that spans at least 1 / beta.

    A gap of 1 / beta is what divides the odds of a weight, weight / (beta - weight), by e.
    """
    title = "Anchor gaps of the pairs"
    return _spread_over_time(steps, "anchor_gaps", title, "nats per token", lambda axes: at_least(axes, 1 / beta))


def weights_over_time(steps: Sequence[Row], ceiling: float | None) -> str:
    """Quantiles of the weights over the steps, from 0 to `ceiling`."""
    return _spread_over_time(
        steps, "weights", "Weights of the pairs", "weight", lambda axes: _from_nothing(axes, ceiling)
    )


def _spread_over_time(steps: Sequence[Row], name: str, title: str, ylabel: str, scale: Callable[[Any], None]) -> str:
    """Quantiles of a per-pair column over the steps: median, middle half, middle nine tenths."""

    def draw(axes: Any) -> None:
        columns = pair_columns(steps)
        middles, binned = _binned(columns["step"], columns[name])
        low, lower, median, upper, high = np.array([np.quantile(values, _QUANTILES) for values in binned]).T
        axes.fill_between(middles, low, high, color=BLUE, alpha=0.2, linewidth=0, label="5 % to 95 %")
        axes.fill_between(middles, lower, upper, color=BLUE, alpha=0.4, linewidth=0, label="25 % to 75 %")
        axes.plot(middles, median, color=BLUE, label="median")
        scale(axes)

    return figure(title, "step", ylabel, draw)


def flipped_weights(steps: Sequence[Row], ceiling: float | None) -> str:
    """Mean weight of flipped and of clean pairs over the steps, with two standard errors, from 0 to `ceiling`."""

    def draw(axes: Any) -> None:
        columns = pair_columns(steps)
        flipped = columns["is_flipped"] == 1
        for group, label, colour in groups(flipped, len(flipped)):
            middles, binned = _binned(columns["step"][group], columns["weights"][group])
            mean = np.array([np.mean(values) for values in binned])
            error = np.array([2 * np.std(values) / np.sqrt(len(values)) for values in binned])
            axes.plot(middles, mean, color=colour, label=label)
            axes.fill_between(middles, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)
        _from_nothing(axes, ceiling)

    return figure("Weight of flipped and of clean pairs", "step", "mean weight", draw)


def flipped_histogram(steps: Sequence[Row], ceiling: float | None) -> str:
    """Distribution of the weights of flipped and of clean pairs in the last quarter of the steps."""
    columns = pair_columns(steps)
    late = columns["step"] >= np.quantile(columns["step"], 0.75)
    weights, flipped = columns["weights"][late], columns["is_flipped"][late] == 1
    return histogram(
        "Weights in the last quarter of the run", "weight", weights, flipped, (0.0, ceiling or weights.max())
    )


def _from_nothing(axes: Any, ceiling: float | None) -> None:
    """An axis of weights: from 0 to `ceiling`; to the largest one where weights are above it or there is none."""
    within = ceiling is not None and axes.dataLim.y1 <= ceiling
    axes.set_ylim(min(0, axes.dataLim.y0), ceiling if within else axes.get_ylim()[1])


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
