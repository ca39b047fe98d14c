"""The page of `gapo score`: the distribution of gaps and weights, the extreme pairs, and how well they detect flips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo.config import GAPOConfig
from gapo.files import write_text
from gapo.reweighting import SETTINGS, verdict
from gapo.runs.output import noise, plots
from gapo.runs.output.pages import render_page
from gapo.runs.output.shown_text import as_text
from gapo.runs.output.tables import Row
from gapo.runs.score.score_table import by_pair
from gapo.runs.score.score_verdict import model_disagrees, weights_say

_SHOWN = 10
_LETTERS = 240
_TICK = 28  # letters of a model's name below a picture; of a longer one, the last
_MEASURES = ("gap", "weight", "margin")


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
    step = GAPOConfig(**{name: settings[name] for name in SETTINGS if name in settings})
    said = _verdicts(scores, checkpoints, step)
    pictures = [
        plots.histogram("Anchor gaps", "nats per token", values["gap"], labels, 1 / step.beta),
        plots.histogram("Weights", "weight", values["weight"], labels, (0.0, step.beta)),
        plots.histogram("Margins", "nats per token", values["margin"], labels, 1 / step.beta),
    ]
    if detected.get("fifths"):
        about = ("Flipped labels in each fifth of the weights", "% flipped")
        pictures.append(plots.fifths(detected["fifths"], detected["share"], *about))
    if len(checkpoints) > 1:
        pictures.append(_over_checkpoints(scores, checkpoints, labels, 1 / step.beta))
    return render_page(
        Path(__file__).with_name("score.html.jinja"),
        title=title,
        count=len(pairs),
        settings=settings,
        shown_settings=[
            (name, ", ".join(value) if name == "models" else value)
            for name, value in settings.items()
            if name not in ("versions", "first_order_ratio")
        ],
        overview=[_overview(name, [s for s in scores if s["checkpoint"] == name], pairs) for name in checkpoints],
        verdict=weights_say(values, detected, step.beta, [said.get(name) for name in checkpoints]),
        doubt=model_disagrees(values["margin"]),
        verdicts=said if len(checkpoints) > 1 else {},
        beta=step.beta,
        flips=detected,
        any_flipped=bool(flipped.any()),
        brittle=[_shown(i, pairs[i], values) for i in order[::-1][:_SHOWN]],
        trusted=[_shown(i, pairs[i], values) for i in order[:_SHOWN]],
        pictures=pictures,
    )


def _verdicts(scores: Sequence[Row], checkpoints: Sequence[str], step: GAPOConfig) -> dict[str, str]:
    """What `gapo.reweighting` says of the gaps of each checkpoint, where it says something."""
    said = {}
    for name in checkpoints:
        gaps = np.array([score["gap"] for score in scores if score["checkpoint"] == name])
        if gaps.any() and (text := verdict(float(gaps.mean()), float(gaps.std()), step)) is not None:
            said[name] = text
    return said


def flips(measures: dict[str, np.ndarray], is_flipped: np.ndarray) -> dict[str, Any]:
    """How well each measure detects the flips; empty where no pair, or every pair, is flipped.

    Args:
        measures: "gap", "weight" and "margin", each (n,).
        is_flipped: (n,) True where the label was flipped.

    Returns:
        "share" of flips; "chance", how far an AUROC strays from 0.5 by chance; "auroc" of a large gap, a small weight
        and a small margin as detectors of flips; "fifths", the share of flips in each fifth of the weights, None of
        fewer than five pairs.
    """
    if is_flipped.all() or not is_flipped.any():
        return {}
    enough = len(is_flipped) >= noise.FIFTHS
    return {
        "share": float(is_flipped.mean()),
        "chance": noise.chance(is_flipped),
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
    texts = {name: _cut(as_text(pair[name])) for name in ("prompt", "chosen", "rejected")}
    numbers = {name: float(column[i]) for name, column in values.items()}
    return {"row": int(i), "id": pair.get("id"), "is_flipped": pair.get("is_flipped"), **texts, **numbers}


def _cut(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1].rstrip() + "…"


def _over_checkpoints(
    scores: Sequence[Row], checkpoints: Sequence[str], is_flipped: np.ndarray | None, span: float
) -> str:
    def draw(axes: Any) -> None:
        gaps = np.array([score["gap"] for score in scores]).reshape(len(checkpoints), -1)
        places = range(len(checkpoints))
        for group, label, colour in plots.groups(is_flipped, gaps.shape[1]):
            axes.plot(places, gaps[:, group].mean(1), marker="o", color=colour, label=label or None)
        plots.at_least(axes, span)
        names = [name if len(name) <= _TICK else f"…{name[1 - _TICK :]}" for name in checkpoints]
        tilted = sum(map(len, names)) > 60
        axes.set_xticks(places, names, rotation=30 if tilted else 0, ha="right" if tilted else "center")

    return plots.figure("Mean gap at each checkpoint", "checkpoint", "nats per token", draw)
