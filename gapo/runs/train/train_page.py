"""`report.html`: one self-contained page on a run, readable in light and in dark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from gapo import objective, reweighting
from gapo.config import GAPOConfig
from gapo.files import read_lines, write_text
from gapo.reweighting import SETTINGS
from gapo.runs.output import plots
from gapo.runs.output.noise import pair_columns, weight_diagnostics
from gapo.runs.output.pages import render_page
from gapo.runs.train.train_verdict import loss_against_accuracy, verdict

_MEASURES = {
    "eval_rewards/accuracies": "reward accuracy",
    "eval_loss": "loss (no anchor)",
    "eval_rewards/margins": "reward margin, beta x nats per token",
    "eval_reference/accuracies": "share of pairs whose margin has grown on the reference's",
    "eval_reference/margins": "margin minus the reference's, nats",
    "eval_logps/chosen": "log-probability of chosen, nats per token",
    "eval_logps/rejected": "log-probability of rejected, nats per token",
}
_SIXTEEN_BITS = 0.01  # how far a number in bfloat16 may be off, as a share of itself


def write_report(folder: Path, summary: dict[str, Any]) -> Path:
    """Write `folder`/report.html from the run's files and its summary; returns its path."""
    path = folder / "report.html"
    write_text(path, render(folder, summary))
    return path


def render(folder: Path, summary: dict[str, Any]) -> str:
    """The page as text. Texts of users (names, data, settings) are escaped."""
    steps, metrics = read_lines(folder / "steps.jsonl"), read_lines(folder / "metrics.jsonl")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    step_config = GAPOConfig(**{name: config[name] for name in (*SETTINGS, "label_smoothing") if name in config})
    ceiling = _ceiling(steps, step_config)
    drifts = [row for row in metrics if "drift/held_out_margin" in row]
    return render_page(
        Path(__file__).with_name("train.html.jinja"),
        title=folder.name,
        summary=summary,
        measures=_MEASURES,
        flips=diagnostics(steps),
        verdict=verdict(summary),
        loss_rose=loss_against_accuracy(summary),
        weights=_weights_verdict(steps, summary, step_config),
        weighs=bool(steps) and "weights" in steps[0],
        has_gaps=bool(steps) and "anchor_gaps" in steps[0],
        ceiling=ceiling,
        data=(folder / "data.txt").read_text(encoding="utf-8"),
        config=config,
        pictures=_pictures(metrics, steps, step_config.beta, ceiling),
        drifts=drifts,
        drift_pictures=[Markup(svg) for svg in plots.drift(drifts)] if drifts else [],
    )


def _weights_verdict(steps: list[dict[str, Any]], summary: dict[str, Any], config: GAPOConfig) -> str | None:
    """What `gapo.reweighting` says of the run's anchor gaps: their mean, and their deviation within a micro-batch."""
    if not summary.get("weighs_by_gap"):
        return None
    gaps = [np.array(row["anchor_gaps"]) for row in steps if len(row.get("anchor_gaps", ())) > 1]
    if not any(np.any(x) for x in gaps):
        return None
    return reweighting.verdict(float(np.concatenate(gaps).mean()), float(np.mean([x.std() for x in gaps])), config)


def _ceiling(steps: list[dict[str, Any]], config: GAPOConfig) -> float | None:
    """The highest weight that the loss can give, beta; None for losses whose weights are of another form."""
    if not steps or not {"anchor_gaps", "weights"} <= steps[0].keys():
        return None
    settings: dict[str, Any] = {
        name: getattr(config, name) for name in ("beta", "gamma", "loss_type", "label_smoothing")
    }
    of_gaps = objective.weights(np.array(steps[0]["anchor_gaps"]), **settings)
    return config.beta if np.allclose(steps[0]["weights"], of_gaps, rtol=_SIXTEEN_BITS) else None


def diagnostics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """`weight_diagnostics` over every pair of the run; empty without weights or flips."""
    if not steps:
        return {}
    columns = pair_columns(steps)
    return weight_diagnostics(columns["weights"], columns["is_flipped"])


def _pictures(
    metrics: list[dict[str, Any]], steps: list[dict[str, Any]], beta: float, ceiling: float | None
) -> list[str]:
    pictures = [plots.reward_accuracy(metrics), plots.margins(metrics), plots.logps(metrics)]
    columns = steps[0] if steps else {}
    if "anchor_gaps" in columns:
        pictures.append(plots.gaps_over_time(steps, beta))
    if "weights" in columns:
        pictures.append(plots.weights_over_time(steps, ceiling))
    if diagnostics(steps):
        pictures += [plots.flipped_weights(steps, ceiling), plots.flipped_histogram(steps, ceiling)]
    return pictures
