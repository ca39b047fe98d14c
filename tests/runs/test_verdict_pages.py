"""What the pages of `gapo train` and `gapo score` say where all weights are equal or 0, or do their work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gapo import data, files
from gapo.runs.score import score_page
from gapo.runs.train import train_page

EQUAL, NOTHING = "the weights of the pairs are all equal", "the weights of nearly all pairs are 0"
# Deviation and mean of the gaps; beta 2.5 and gamma 0.25 then leave weights that are equal, 0, or do their work.
CASES = [
    (0.001, 0.0, {"rho": 0.3}, EQUAL),
    (0.1, 3.0, {"rho": 0.3}, NOTHING),
    (0.3, 0.1, {"rho": 0.3}, None),
    (0.001, 0.0, {"rho": 0.0}, None),  # equal weights are what was asked for
    (0.001, 0.0, {"rho": 0.025, "target_gap": 0.001}, "raise target_gap=0.001"),
]


def gaps_of(deviation: float, mean: float, n: int) -> np.ndarray:
    gaps = np.random.default_rng(0).normal(size=n)
    return mean + deviation * (gaps - gaps.mean()) / gaps.std()


def train_text(folder: Path, gaps: np.ndarray, config: dict[str, Any], **summary: Any) -> str:
    steps = [
        {"step": i + 1, "margins": [0.1] * 8, "anchor_gaps": row.tolist(), "weights": [1.0] * 8}
        | {"is_flipped": [0] * 8, "pair": list(range(8))}
        for i, row in enumerate(gaps.reshape(-1, 8))
    ]
    evaluation = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.6, "eval_rewards/margins": 0.1}
    evaluation |= {"eval_logps/chosen": -1.0, "eval_logps/rejected": -1.1}
    files.write_rows(folder / "steps.jsonl", steps)
    files.write_rows(folder / "metrics.jsonl", [{"step": 0, **evaluation}, {"step": 2, **evaluation}])
    settings = {"beta": 2.5, "gamma": 0.25, "loss_type": "sigmoid", **config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "data.txt").write_text("pairs\n")
    about = {"before": evaluation, "after": evaluation, "loss": "gapo", "seconds": 1.0, "versions": {}}
    about |= {"needs_anchor": True, "train_pairs": 16, "flipped": 0, "held_out_pairs": 8}
    return train_page.render(folder, {"weighs_by_gap": True, **about, **summary})


@pytest.mark.parametrize(("deviation", "mean", "config", "said"), CASES)
def test_the_report_of_a_training(
    tmp_path: Path, deviation: float, mean: float, config: dict[str, Any], said: str | None
) -> None:
    text = train_text(tmp_path, gaps_of(deviation, mean, 16), config)
    assert ("Look at the weights" in text) is (said is not None)
    assert said is None or said in text
    assert "Look at the weights" not in train_text(tmp_path, gaps_of(deviation, mean, 16), config, weighs_by_gap=False)


@pytest.mark.parametrize(("deviation", "mean", "config", "said"), CASES)
def test_the_page_of_scores(deviation: float, mean: float, config: dict[str, Any], said: str | None) -> None:
    """Of two checkpoints the page speaks of the one that it concerns."""
    pairs = [{**row, "is_flipped": i < 4} for i, row in enumerate(data.generate_pairs(16))]
    scores = [
        {"row": i, "checkpoint": name, "margin": 0.1, "gap": float(gap), "weight": 1.0, "gaps": [float(gap)] * 2}
        for name, gaps in (("the first", gaps_of(0.3, 0.1, 16)), ("the second", gaps_of(deviation, mean, 16)))
        for i, gap in enumerate(gaps)
    ]
    settings = {"beta": 2.5, "gamma": 0.25, "loss_type": "sigmoid", "pairs": "p", "models": ["m"], "repeats": 2}
    settings |= {"batch_size": 8, "adaptive": True, "anchor": "exact", "first_order_ratio": 1.0, "versions": {}}
    text = score_page.render(pairs, scores, {**settings, **config}, "scores")
    leads = [part.partition("</p>")[0] for part in text.split("<p") if "Look at the weights" in part]
    assert len(leads) == (said is not None)
    for lead in leads:
        assert said in lead
        assert "of the second" in lead
        assert "the first" not in lead
