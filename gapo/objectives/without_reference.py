"""Objectives of the policy alone, and GAPO's, on length-normalised log-probabilities."""

from __future__ import annotations

from gapo._namespace import Array, Namespace, stop_gradient
from gapo.objective import pair_losses
from gapo.objectives.formulas import objective
from gapo.pairs import LogProbs

_LARGEST_EXPONENT = 60.0


@objective(
    paper="Cho, Kim, Kim, arXiv 2602.04909",
    needs_anchor=True,
    average=True,
    of_margins=True,
    step_settings={name: name for name in ("beta", "gamma", "loss_type", "label_smoothing")},
)
def gapo(
    logps: LogProbs,
    *,
    beta: float = 2.5,
    gamma: float | Array = 0.25,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Array:
    """GAPO: `-log sigmoid(beta * Gamma - gamma)`, with Gamma the anchor gap. The same as `gapo.loss`.

    Args:
        beta: logistic temperature, > 0.
        gamma: target gap times beta: a float, or (N,) one for each pair.
        loss_type: "sigmoid" or "hinge".
        label_smoothing: in [0, 0.5).

    Source: Cho, Kim, Kim, arXiv 2602.04909; method document, step 5.
    """
    return pair_losses(logps.anchor_gaps, beta, gamma, loss_type, label_smoothing, logps.xp)


@objective(
    paper="Meng, Xia, Chen, arXiv 2405.14734",
    average=True,
    of_margins=True,
    step_settings={"beta": "beta", "gamma": "gamma"},
)
def simpo(logps: LogProbs, *, beta: float = 2.5, gamma: float | Array = 0.25) -> Array:
    """SimPO: `-log sigmoid(beta * M - gamma)`, with M the margin of length-normalised log-probabilities.

    Args:
        beta: logistic temperature, > 0.
        gamma: target margin times beta (SimPO's code takes `gamma / beta`): a float, or (N,) one for each pair.

    Source: Meng, Xia, Chen, arXiv 2405.14734; the defaults are its recipe for Mistral-7B-Instruct. It is also the probe
    loss of GAPO (method document, step 2).

    >>> import numpy as np
    >>> round(float(simpo(np.array([-1.0]), np.array([-1.1]))), 4)
    0.6931
    """
    return pair_losses(logps.margins, beta, gamma, "sigmoid", 0.0, logps.xp)


@objective(paper="Deng, Feng, Lei, arXiv 2511.09385", average=True, of_margins=True, batch_statistics=True)
def amapo(logps: LogProbs, *, beta: float = 2.0) -> Array:
    """AMaPO: SimPO with a target of each pair's own, larger the further the pair lags behind its batch.

    `-log sigmoid(beta * M - m)`, with the constant `m = beta * [M < mu] * exp((mu - M) / s * mu)`, where mu and s are
    the mean and the sample standard deviation of M over the batch. A pair at or above the mean has the target 0. The
    target carries no gradient.

    Args:
        beta: logistic temperature, > 0.

    Source: Deng, Feng, Lei, arXiv 2511.09385; beta 2 is its recipe for Mistral-7B, of 2 to 3 overall.

    >>> import numpy as np
    >>> round(float(amapo(np.array([-1.0]), np.array([-1.0]))), 4)
    0.6931
    """
    gamma = beta * _adaptive_targets(stop_gradient(logps.margins), logps.xp)
    return pair_losses(logps.margins, beta, gamma, "sigmoid", 0.0, logps.xp)


def _adaptive_targets(margins: Array, xp: Namespace) -> Array:
    """[M < mu] * exp((mu - M) / s * mu), (N,). It is 0 where all pairs are equal, and for one pair alone."""
    mean = xp.mean(margins)
    squares = xp.sum((margins - mean) ** 2) / max(1, margins.shape[0] - 1)
    below = (margins < mean) & (squares > 0)
    spread = xp.sqrt(xp.where(squares > 0, squares, xp.ones_like(squares)))
    exponent = xp.where(below, (mean - margins) / spread * mean, xp.zeros_like(margins))
    # exp overflows float32 at 88; the gradient of such a pair is saturated long before
    exponent = xp.where(exponent > _LARGEST_EXPONENT, _LARGEST_EXPONENT * xp.ones_like(exponent), exponent)
    return xp.where(below, xp.exp(exponent), xp.zeros_like(margins))
