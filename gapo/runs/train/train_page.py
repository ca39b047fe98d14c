"""`report.html`: one self-contained page on a run, readable in light and in dark."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from gapo.config import GAPOConfig
from gapo.files import read_lines, write_text
from gapo.reweighting import verdict
from gapo.runs.output import plots
from gapo.runs.output.noise import pair_columns, weight_diagnostics
from gapo.runs.output.pages import render_page

_MEASURES = {
    "eval_rewards/accuracies": "reward accuracy",
    "eval_loss": "loss (no anchor)",
    "eval_rewards/margins": "reward margin, beta x nats per token",
    "eval_reference/accuracies": "share of pairs whose margin has grown on the reference's",
    "eval_reference/margins": "margin minus the reference's, nats",
    "eval_logps/chosen": "log-probability of chosen, nats per token",
    "eval_logps/rejected": "log-probability of rejected, nats per token",
}
_SPREADS = (
    ("anchor_gaps", "Anchor gaps of the pairs", "nats per token"),
    ("weights", "Weights of the pairs", "weight"),
)


def write_report(folder: Path, summary: dict[str, Any]) -> Path:
    """Write `folder`/report.html from the run's files and its summary; returns its path."""
    path = folder / "report.html"
    write_text(path, render(folder, summary))
    return path


def render(folder: Path, summary: dict[str, Any]) -> str:
    """The page as text. Texts of users (names, data, settings) are escaped."""
    steps, metrics = read_lines(folder / "steps.jsonl"), read_lines(folder / "metrics.jsonl")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    drifts = [row for row in metrics if "drift/held_out_margin" in row]
    return render_page(
        Path(__file__).with_name("train.html.jinja"),
        title=folder.name,
        summary=summary,
        measures=_MEASURES,
        flips=diagnostics(steps),
        verdict=_verdict(steps, summary, config),
        data=(folder / "data.txt").read_text(encoding="utf-8"),
        config=config,
        pictures=_pictures(metrics, steps),
        drifts=drifts,
        drift_pictures=[Markup(svg) for svg in plots.drift(drifts)] if drifts else [],
    )


def _verdict(steps: list[dict[str, Any]], summary: dict[str, Any], config: dict[str, Any]) -> str | None:
    """What `gapo.reweighting` says of the run's anchor gaps: their mean, and their deviation within a micro-batch."""
    if not summary.get("weighs_by_gap"):
        return None
    gaps = [np.array(row["anchor_gaps"]) for row in steps if len(row.get("anchor_gaps", ())) > 1]
    if not any(np.any(x) for x in gaps):
        return None
    step_config = GAPOConfig(**{f.name: config[f.name] for f in fields(GAPOConfig) if f.name in config})
    return verdict(float(np.concatenate(gaps).mean()), float(np.mean([x.std() for x in gaps])), step_config)


def diagnostics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """`weight_diagnostics` over every pair of the run; empty without weights or flips."""
    if not steps:
        return {}
    columns = pair_columns(steps)
    return weight_diagnostics(columns["weights"], columns["is_flipped"])


def _pictures(metrics: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[str]:
    pictures = [plots.reward_accuracy(metrics), plots.margins(metrics), plots.logps(metrics)]
    columns = steps[0] if steps else {}
    for name, title, unit in _SPREADS:
        if name in columns:
            pictures.append(plots.spread_over_time(steps, name, title, unit))
    if diagnostics(steps):
        pictures += [plots.flipped_weights(steps), plots.flipped_histogram(steps)]
    return pictures
