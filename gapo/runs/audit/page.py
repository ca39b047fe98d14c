"""The page of an audit: its verdict, charts, and the most suspicious pairs, to be searched, filtered and marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo.config import GAPOConfig
from gapo.files import write_text
from gapo.runs.audit.audit_result import AuditResult, rule_of_length, verdict
from gapo.runs.audit.marks import MARKS
from gapo.runs.output import plots
from gapo.runs.output.pages import render_page, share
from gapo.runs.output.shown_text import turns, visible
from gapo.runs.output.tables import Row

_LETTERS = 20_000  # of one text; the table holds the whole
_LONG, _LINES = 450, 12  # letters or lines from which a text is folded
_EXACT = 2**53  # whole numbers from here on lose digits in a browser
_KEYS = dict(zip("wru", MARKS, strict=True))


def write_page(path: Path, result: AuditResult, *, most: int = 500) -> None:
    """Write the page on `result` to `path`, atomically, with at most `most` pairs, the most suspicious first."""
    write_text(path, render(result, most=most))


def render(result: AuditResult, *, most: int = 500) -> str:
    """The page as text. Texts of users are escaped."""
    rows, summary, folder = result.rows, result.summary, Path(__file__).parent
    shown = rows[:most] if summary["learned"] else []
    return render_page(
        folder / "audit.html.jinja",
        title=f"audit of {visible(summary['source'])}",
        script=(folder / "audit.js").read_text(encoding="utf-8"),
        style=(folder / "audit.css").read_text(encoding="utf-8"),
        pictures=pictures(rows, summary),
        verdict=first_line(summary, len(shown)),
        rule=rule_of_length(summary),
        summary=summary,
        source=visible(summary["source"]),
        model=visible(str(summary["model"])),
        beta=GAPOConfig.beta,
        pairs=[_shown(row) for row in shown],
        left=len(rows) - len(shown),
        keys=_KEYS,
        any_flipped=any(row.get("is_flipped") is not None for row in shown),
        detection=_detection(summary.get("detection") or {}),
    )


def first_line(summary: Row, shown: int) -> str:
    """The verdict, and what the page lists."""
    if not summary["learned"]:
        return verdict(summary)
    listed = f"Here are the {shown:,} most suspicious." if shown < summary["pairs"] else "Here they are, by suspicion."
    return f"{verdict(summary)} {listed}"


def _shown(row: Row) -> Row:
    """What the template takes of a row: texts by turns, and the reason for its place."""
    texts = {name: [_turn(*turn) for turn in turns(row.get(name) or "")] for name in ("prompt", "chosen", "rejected")}
    own = row.get("id")
    exact = str(own) if isinstance(own, float) or (isinstance(own, int) and abs(own) >= _EXACT) else own
    return {
        **{name: row.get(name) for name in ("rank", "row", "line", "is_flipped", "mark")},
        "id": exact if isinstance(exact, (str, int, type(None))) else str(exact),
        "name": None if own is None else visible(str(own)),
        "p": float(row["p_wrong"]),
        "percent": _percent(float(row["p_wrong"])),
        "why": why(row),
        "is_long": any(turn["is_long"] for parts in texts.values() for turn in parts),
        "has_prompt": any(turn["text"].strip() for turn in texts["prompt"]),
        **texts,
    }


def why(row: Row) -> str:
    """Why a pair is suspected, in one line.

    >>> why({"margin": -1.2, "against": 5, "policies": 5, "gap": 0.8, "weight": 0.31})
    'margin -1.20 nats per token, against the label in 5 of 5 policies; gap 0.80, weight 0.31'
    """
    policies = f"{row['against']} of {row['policies']} policies"
    text = f"margin {row['margin']:.2f} nats per token, against the label in {policies}"
    beside = [f"{name} {row[name]:.2f}" for name in ("gap", "weight") if _is_number(row.get(name))]
    return "; ".join([text, ", ".join(beside)]) if beside else text


def _turn(role: str, text: str) -> Row:
    left = len(text) - _LETTERS
    cut = f"{text[:_LETTERS]}… ({left:,} more letters)" if left > 0 else text
    return {"role": role, "text": cut, "is_long": len(text) > _LONG or text.count("\n") >= _LINES}


def _percent(p: float) -> str:
    return "over 99 %" if 0.995 <= p < 1 else "under 1 %" if 0 < p < 0.005 else share(p, 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _detection(detection: Row) -> list[list[str]]:
    """A line for each score: its name, AUROC and precision."""
    precision = detection.get("precision") or {}
    return [
        [name, f"{value:.3f}", share(precision[name]) if name in precision else ""]
        for name, value in (detection.get("auroc") or {}).items()
    ]


def pictures(rows: Sequence[Row], summary: Row) -> list[str]:
    """The charts, as SVG: probabilities, margins and weights of all pairs, and where the suspicious ones are."""
    flips = [row.get("is_flipped") for row in rows]
    flipped = np.array(flips, dtype=bool) if None not in flips and 0 < sum(map(bool, flips)) < len(flips) else None
    beta = GAPOConfig.beta  # which the weights of an audit are of
    values = {name: [row.get(name) for row in rows] for name in ("p_wrong", "margin", "weight")}
    charts: list[tuple[str, str, str, tuple[float, float] | float, float]] = [
        ("Probability that a label is wrong", "probability, %", "p_wrong", (0.0, 100.0), 100.0),
        ("Margins by policies that did not train on the pair", "nats per token; below 0: against the label", "margin",
         1 / beta, 1.0),
        ("Weights in a GAPO update", "weight", "weight", (0.0, beta), 1.0),
    ]  # fmt: skip
    drawn = []
    for title, unit, name, span, scale in charts:
        if all(map(_is_number, values[name])):
            column = scale * np.array(values[name], dtype=float)
            drawn.append(plots.histogram(title, unit, column, flipped, span))
    if summary["learned"] and summary.get("fifths"):
        shares = summary["fifths"]
        title = "Suspicious labels in each fifth of the weights"
        drawn.append(plots.fifths(shares, float(np.mean(shares)), title, "% suspicious"))
    return drawn
