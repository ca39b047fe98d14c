"""The first sentences of the page of `gapo score`: what weights and gaps say of the pairs, or that they say nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gapo.runs.output.noise import beyond_a_coin_toss
from gapo.runs.output.pages import share


def weights_say(
    values: Mapping[str, np.ndarray], detected: Mapping[str, Any], beta: float, said: Sequence[str | None]
) -> str:
    """Whether the weights tell the pairs apart, what to do where they do not, and whether they show the flips.

    Args:
        values: "gap", "weight" and "margin" of each pair, (n,), means over the models.
        detected: what `score_page.flips` returns.
        beta: the highest weight.
        said: what `gapo.reweighting.verdict` says of each model.
    """
    if not values["gap"].any():
        text = "Every gap is 0: rho is 0, all weights are equal, and only margins tell the pairs apart."
    elif None not in said:
        text = f"{str(said[-1])[0].upper()}{str(said[-1])[1:]}."
    else:
        low, high = np.quantile(values["weight"], (0.1, 0.9))
        text = (
            f"The weights tell the pairs apart: a tenth of the pairs weighs {low:.2f} or less, a tenth {high:.2f} or "
            f"more, on a scale from 0 to {beta:g}."
        )
    return f"{text} {_flips_show(detected)}".strip()


def _flips_show(detected: Mapping[str, Any]) -> str:
    if not detected:
        return ""
    auroc, chance = detected["auroc"], detected["chance"]
    if auroc["weight"] - 0.5 <= chance:
        text = f"Low weights do not show which labels are flipped: AUROC {auroc['weight']:.2f}"
    else:
        text = f"Low weights show which labels are flipped: AUROC {auroc['weight']:.2f}"
    if auroc["margin"] - 0.5 > chance and auroc["margin"] > auroc["weight"]:
        text += f", low margins do better, {auroc['margin']:.2f}"
    return f"{text} (chance: 0.50 ± {chance:.2f})."


def model_disagrees(margins: np.ndarray) -> str | None:
    """One line for a model that agrees with the labels no more often than a coin toss does; None for any other.

    Args:
        margins: (n,) nats per token.
    """
    right, n = float((margins > 0).mean()), len(margins)
    if beyond_a_coin_toss(right, n):
        return None
    if beyond_a_coin_toss(1 - right, n):
        wrong = share(1 - right)
        return f"the model prefers the rejected answer in {wrong} of {n:,} pairs. Are the two the wrong way round?"
    return (
        f"the model prefers the chosen answer in {share(right)} of {n:,} pairs, and so does a coin. Its gaps and "
        "margins then say little about the labels. Tune it on such pairs first (gapo train), or have the pairs judged "
        "by policies that are tuned on them (gapo audit)."
    )
