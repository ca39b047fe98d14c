"""The page of `gapo score`: the distribution of gaps and weights, the extreme pairs, and how well they detect flips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo.config import GAPOConfig
from gapo.data.messages import text_of
from gapo.files import write_text
from gapo.reweighting import SETTINGS, verdict
from gapo.runs.output import noise, plots
from gapo.runs.output.pages import render_page
from gapo.runs.output.tables import Row
from gapo.runs.score.score_table import by_pair

_SHOWN = 10
_LETTERS = 240
_TICK = 28  # letters of a model's name below a picture; of a longer one, the last
_MEASURES = ("gap", "weight", "margin")
_GROUPS = ((False, "clean pairs", plots.BLUE), (True, "flipped pairs", plots.ORANGE))


def write_page(path: Path, pairs: Sequence[Row], scores: Sequence[Row], settings: Row) -> None:
    """Write the page on `scores` (of `table.score_rows`) of `pairs`, with what was set, to `path`."""
    write_text(path, render(pairs, scores, settings, path.name.removesuffix(".html")))


def render(pairs: Sequence[Row], scores: Sequence[Row], settings: Row, title: str) -> str:
    """The page as text. Texts of users are escaped, long ones cut."""
    values = {name: by_pair(scores, name) for name in _MEASURES}
    labelled = np.array([pair.get("is_flipped") is not None for pair in pairs])
    flipped = np.array([bool(pair.get("is_flipped")) for pair in pairs])
    labels = flipped if labelled.all() and 0 < flipped.sum() < len(flipped) else None
    detected = flips({name: column[labelled] for name, column in values.items()}, flipped[labelled])
    order = np.argsort(values["gap"], kind="stable")
    checkpoints = list(dict.fromkeys(score["checkpoint"] for score in scores))
    pictures = [
        _histogram("Anchor gaps", "nats per token", values["gap"], labels),
        _histogram("Weights", "weight", values["weight"], labels),
    ]
    if detected.get("fifths"):
        pictures.append(_fifths(detected["fifths"], detected["share"]))
    if len(checkpoints) > 1:
        pictures.append(_over_checkpoints(scores, checkpoints, flipped if labels is not None else None))
    return render_page(
        Path(__file__).with_name("score.html.jinja"),
        title=title,
        count=len(pairs),
        settings=settings,
        overview=[_overview(name, [s for s in scores if s["checkpoint"] == name], pairs) for name in checkpoints],
        verdicts=_verdicts(scores, checkpoints, settings),
        flips=detected,
        any_flipped=bool(flipped.any()),
        brittle=[_shown(i, pairs[i], values) for i in order[::-1][:_SHOWN]],
        trusted=[_shown(i, pairs[i], values) for i in order[:_SHOWN]],
        pictures=pictures,
    )


def _verdicts(scores: Sequence[Row], checkpoints: Sequence[str], settings: Row) -> dict[str, str]:
    """What `gapo.reweighting` says of the gaps of each checkpoint, where it says something."""
    step_config = GAPOConfig(**{name: settings[name] for name in SETTINGS if name in settings})
    said = {}
    for name in checkpoints:
        gaps = np.array([score["gap"] for score in scores if score["checkpoint"] == name])
        if gaps.any() and (text := verdict(float(gaps.mean()), float(gaps.std()), step_config)) is not None:
            said[name] = text
    return said


def flips(measures: dict[str, np.ndarray], is_flipped: np.ndarray) -> dict[str, Any]:
    """How well each measure detects the flips; empty where no pair, or every pair, is flipped.

    Args:
        measures: "gap", "weight" and "margin", each (n,).
        is_flipped: (n,) True where the label was flipped.

    Returns:
        "share" of flips; "auroc" of a large gap, a small weight and a small margin as detectors of flips; "fifths", the
        share of flips in each fifth of the weights, None of fewer than five pairs.
    """
    if is_flipped.all() or not is_flipped.any():
        return {}
    enough = len(is_flipped) >= noise.FIFTHS
    return {
        "share": float(is_flipped.mean()),
        "auroc": {k: noise.auroc(v if k == "gap" else -v, is_flipped) for k, v in measures.items()},
        "fifths": noise.fifths(measures["weight"], is_flipped) if enough else None,
    }


def agreement(scores: Sequence[Row]) -> float | None:
    """Mean correlation between the gaps of any two repeats; None without repeats, or where all gaps are equal."""
    if not scores or "gaps" not in scores[0]:
        return None
    repeats = np.array([score["gaps"] for score in scores]).T
    if len(repeats[0]) < 2 or (repeats.std(1) == 0).any():
        return None
    table = np.corrcoef(repeats)
    return float(table[np.triu_indices(len(table), 1)].mean())


def _overview(name: str, scores: Sequence[Row], pairs: Sequence[Row]) -> Row:
    """The line on one checkpoint. "right" is reward accuracy by true labels, "positive" by the labels as given."""
    flipped = [bool(pair.get("is_flipped")) for pair in pairs]
    values = {k: np.array([score[k] for score in scores]) for k in _MEASURES}
    labelled = [i for i, pair in enumerate(pairs) if pair.get("is_flipped") is not None]
    labels = np.array([pairs[i]["is_flipped"] for i in labelled], dtype=bool)
    detected = flips({k: column[labelled] for k, column in values.items()}, labels)
    return {
        "checkpoint": name,
        **{k: column.mean() for k, column in values.items()},
        "positive": (values["margin"] > 0).mean(),
        "right": (np.where(flipped, -1, 1) * values["margin"] > 0).mean(),
        "gap_std": values["gap"].std(),
        "auroc": detected["auroc"]["gap"] if detected else None,
        "agreement": agreement(scores),
    }


def _shown(i: int, pair: Row, values: dict[str, np.ndarray]) -> Row:
    texts = {name: _cut(text_of(pair[name])) for name in ("prompt", "chosen", "rejected")}
    numbers = {name: float(column[i]) for name, column in values.items()}
    return {"row": int(i), "id": pair.get("id"), "is_flipped": pair.get("is_flipped"), **texts, **numbers}


def _cut(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1].rstrip() + "…"


def _groups(is_flipped: np.ndarray | None, n: int) -> list[tuple[np.ndarray, str, str]]:
    """(which pairs, their name, their colour): clean and flipped ones, or all of them without labels."""
    if is_flipped is None:
        return [(np.ones(n, dtype=bool), "", plots.BLUE)]
    return [(is_flipped == value, label, colour) for value, label, colour in _GROUPS]


def _histogram(title: str, unit: str, values: np.ndarray, is_flipped: np.ndarray | None) -> str:
    def draw(axes: Any) -> None:
        edges = np.histogram_bin_edges(values, bins=min(40, max(5, len(values) // 5)))
        for group, label, colour in _groups(is_flipped, len(values)):
            style = {"histtype": "stepfilled", "alpha": 0.5, "color": colour, "label": label or None}
            axes.hist(values[group], bins=edges, density=is_flipped is not None, **style)

    return plots.figure(title, unit, "pairs" if is_flipped is None else "density in each group", draw)


def _fifths(shares: list[float], overall: float) -> str:
    def draw(axes: Any) -> None:
        names = ["lowest", "second", "third", "fourth", "highest"]
        bars = axes.bar(names, [100 * share for share in shares], color=plots.ORANGE, alpha=0.7, width=0.7)
        axes.bar_label(bars, fmt="%.1f")
        axes.axhline(100 * overall, color=plots.BLUE, linewidth=1.2, label="all pairs")

    return plots.figure("Flipped labels in each fifth of the weights", "fifth of the weights", "% flipped", draw)


def _over_checkpoints(scores: Sequence[Row], checkpoints: Sequence[str], is_flipped: np.ndarray | None) -> str:
    def draw(axes: Any) -> None:
        gaps = np.array([score["gap"] for score in scores]).reshape(len(checkpoints), -1)
        places = range(len(checkpoints))
        for group, label, colour in _groups(is_flipped, gaps.shape[1]):
            axes.plot(places, gaps[:, group].mean(1), marker="o", color=colour, label=label or None)
        names = [name if len(name) <= _TICK else f"…{name[1 - _TICK :]}" for name in checkpoints]
        axes.set_xticks(places, names, rotation=30 if len(checkpoints) > 4 else 0)

    return plots.figure("Mean gap at each checkpoint", "checkpoint", "nats per token", draw)
