"""Whether the weights tell pairs apart at all: the one place that decides it, and says what to do where they do not.

A weight is `beta * sigmoid(gamma - beta * gap)`. Where the gaps hardly differ, all weights are equal: nothing is
reweighted, and a loss is trained that is linear in the margins. Where all gaps are large, all weights are about 0.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gapo.config import GAPOConfig
from gapo.objectives import Loss

logger = logging.getLogger(__name__)

# Weights that vary by less than this share of themselves count as equal.
_EQUAL = 0.03
# Weights below this share of beta count as 0, of the pairs up to so many standard deviations below the mean gap.
_NOTHING, _DEVIATIONS = 0.02, 2.0
FIGURES = ("gapo/anchor_gap_mean", "gapo/anchor_gap_std")


def verdict(gap_mean: float, gap_std: float, config: GAPOConfig) -> str | None:
    """One sentence where all weights are equal or all 0, and what to do; None where they do their work.

    None too at rho 0, where equal weights are what was asked for, for the hinge, whose weights are not these, and for
    figures that are not finite.

    Args:
        gap_mean: mean of the anchor gaps, nats per token.
        gap_std: their standard deviation.
        config: its beta, gamma and radius.

    >>> verdict(0.001, 0.0005, GAPOConfig())[:58]
    'the weights of the pairs are all equal, so that nothing is'
    >>> verdict(0.2, 0.1, GAPOConfig(rho=0.5)) is None
    True
    """
    if not config.moves or config.loss_type != "sigmoid" or not math.isfinite(gap_mean + gap_std):
        return None
    if _share(gap_mean - _DEVIATIONS * gap_std, config) < _NOTHING:
        gaps = f"the gaps are {gap_mean:.3g} +- {gap_std:.3g} nats per token"
        way = (
            f"{'rho' if config.target_gap is None else 'target_gap'} or beta is too large, or the policy has run away "
            "(its margins are large, and a small step loses them)"
        )
        return f"the weights of nearly all pairs are 0, so that most of the data is thrown away: {gaps}; {way}"
    if config.beta * gap_std * (1 - _share(gap_mean, config)) < _EQUAL:
        if config.target_gap is None:
            way = f"rho={config.rho} is too small for this model: set target_gap=0.3 in its place, or raise rho"
        else:
            way = f"raise target_gap={config.target_gap}, or give more pairs an anchor in common"
        return (
            f"the weights of the pairs are all equal, so that nothing is reweighted: their gaps vary by {gap_std:.2g} "
            f"nats per token; {way}"
        )
    return None


class Watch:
    """Logs a verdict once for each cause, from the metrics that an adapter reports anyway.

    Args:
        config: settings of the step.
        loss: of the training. Only losses with weights of this form are watched (`Objective.weighs_by_gap`).
        log: where to, of (message).
    """

    def __init__(self, config: GAPOConfig, loss: Loss, log: Callable[[str], None] = logger.warning) -> None:
        own = {"beta": loss.settings.get("gap_beta"), "gamma": loss.settings.get("gap_gamma")}
        self._config = replace(config, **{name: x for name, x in own.items() if x})
        self._applies, self._log = loss.objective.weighs_by_gap and own["beta"] != 0, log
        self._said: set[str] = set()

    def see(self, metrics: Mapping[str, Any]) -> None:
        """Judge a window's metrics; those without an anchor, or with a radius of 0, say nothing."""
        there = all(name in metrics for name in (*FIGURES, "gapo/radius"))
        if not self._applies or not there or float(metrics["gapo/radius"]) == 0:
            return
        mean, deviation = (float(metrics[name]) for name in FIGURES)
        text = verdict(mean, deviation, self._config)
        cause = None if text is None else text.partition(",")[0]
        if text is not None and cause not in self._said:
            self._said.add(str(cause))
            self._log(text)


def _share(gap: float, config: GAPOConfig) -> float:
    """The weight at this gap, as a share of beta."""
    return 0.5 * (1 + math.tanh((config.gamma - config.beta * gap) / 2))
