"""The first sentence of a run's report: whether the policy learnt, by its accuracy on held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gapo.runs.output.noise import beyond_a_coin_toss
from gapo.runs.output.pages import share

_ACCURACY, _LOSS = "eval_rewards/accuracies", "eval_loss"


def verdict(summary: Mapping[str, Any]) -> str:
    """What was learnt: accuracy before and after, held against what chance alone moves it by (two standard errors)."""
    n, before, after = summary["held_out_pairs"], *_both(summary, _ACCURACY)
    if after is None or not math.isfinite(after):
        return "The run has no held-out accuracy: whether the policy learnt cannot be told."
    now = f"it prefers the chosen answer in {share(after)} of {n:,} held-out pairs"
    if before is None or not math.isfinite(before):
        return f"The policy at the end: {now} (50 % is a coin toss)."
    chance = by_chance(before, after, n)
    numbers = f"{now}, {share(before)} before training (50 % is a coin toss)"
    if summary.get("unmoved"):
        return f"Nothing was learnt: {numbers}."
    if after - before > chance:
        if beyond_a_coin_toss(after, n):
            return f"The policy has learnt: {numbers}."
        return f"The policy has learnt, but not enough to be right more often than a coin: {numbers}."
    if before - after > chance:
        return f"The policy has become worse: {numbers}."
    moved = f"chance alone moves this by {100 * chance:.1f} points"
    return f"No change that {n:,} held-out pairs could show: {numbers}, and {moved}."


def by_chance(before: float, after: float, n: int) -> float:
    """Two standard errors of the difference of two accuracies on n pairs each, were the true ones equal."""
    middle = (before + after) / 2
    return 2 * math.sqrt(2 * middle * (1 - middle) / max(n, 1))


def loss_against_accuracy(summary: Mapping[str, Any]) -> str | None:
    """Why the loss rose while accuracy grew, where it did; else None."""
    (loss, new_loss), (before, after) = _both(summary, _LOSS), _both(summary, _ACCURACY)
    if loss is None or new_loss is None or before is None or after is None:
        return None
    if not (new_loss > loss and after > before):
        return None
    return (
        f"The loss rose from {loss:.3f} to {new_loss:.3f} although accuracy grew. Accuracy counts the pairs that are "
        "judged right; the loss also counts by how much the others are judged wrong. As margins grow, so does the "
        "price of each pair that is still wrong, and a few of them outweigh many that came right. Select on accuracy; "
        "where the size of margins matters, train for fewer epochs or at a lower learning_rate."
    )


def _both(summary: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    return summary["before"].get(name), summary["after"].get(name)
