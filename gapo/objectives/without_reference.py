"""Objectives of the policy alone, on length-normalised log-probabilities.

M = logp(chosen) - logp(rejected), in nats per token.
"""

from __future__ import annotations

from gapo import objective
from gapo._namespace import Array, Namespace, stop_gradient
from gapo.objectives.checks import check_settings, prepare

_LARGEST_EXPONENT = 60.0


def simpo(
    chosen_logps: Array,
    rejected_logps: Array,
    *,
    beta: float = 2.5,
    gamma: float | Array = 0.25,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """SimPO: `-log sigmoid(beta * M - gamma)`, with M the margin of length-normalised log-probabilities.

    Args:
        chosen_logps: (N,) length-normalised log-probability of each chosen response, nats per token.
        rejected_logps: (N,) the same of each rejected response.
        beta: logistic temperature, > 0.
        gamma: target margin times beta (SimPO's code takes `gamma / beta`): a float, or (N,) one for each pair.
        reduction: "mean", "sum" or "none".
        backend: "numpy", "torch", "jax" or "mlx" to state the library; None finds it from the arrays.

    Returns:
        Scalar, or (N,) for reduction="none"; float32 or wider.

    Raises:
        TypeError, ValueError: as `gapo.loss`.

    Source: Meng, Xia, Chen, arXiv 2405.14734; the defaults are its recipe for Mistral-7B-Instruct. It is also the probe
    loss of GAPO (method document, step 2).

    >>> import numpy as np
    >>> round(float(simpo(np.array([-1.0]), np.array([-1.1]))), 4)
    0.6931
    """
    xp, (chosen, rejected) = prepare(backend, chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    objective.check_objective(beta, gamma, "sigmoid", 0.0, n=chosen.shape[0])  # gamma may be one for each pair
    check_settings(reduction=reduction)
    return objective.reduce(objective.pair_losses(chosen - rejected, beta, gamma, "sigmoid", 0.0, xp), reduction, xp)


def amapo(
    chosen_logps: Array,
    rejected_logps: Array,
    *,
    beta: float = 2.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """AMaPO: SimPO with a target of each pair's own, larger the further the pair lags behind its batch.

    `-log sigmoid(beta * M - m)`, with the constant `m = beta * [M < mu] * exp((mu - M) / s * mu)`, where mu and s are
    the mean and the sample standard deviation of M over the batch. A pair at or above the mean has the target 0.

    Args:
        chosen_logps: (N,) length-normalised log-probability of each chosen response, nats per token. The N pairs are
            the batch whose statistics set the targets.
        rejected_logps: (N,) the same of each rejected response.
        beta: logistic temperature, > 0.
        reduction: "mean", "sum" or "none".
        backend: "numpy", "torch", "jax" or "mlx" to state the library; None finds it from the arrays.

    Returns:
        Scalar, or (N,) for reduction="none"; float32 or wider. The target carries no gradient.

    Raises:
        TypeError, ValueError: as `gapo.loss`.

    Source: Deng, Feng, Lei, arXiv 2511.09385; beta 2 is its recipe for Mistral-7B, of 2 to 3 overall.

    >>> import numpy as np
    >>> round(float(amapo(np.array([-1.0]), np.array([-1.0]))), 4)
    0.6931
    """
    xp, (chosen, rejected) = prepare(backend, chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_settings(beta=beta, reduction=reduction)
    margins = chosen - rejected
    gamma = beta * _adaptive_targets(stop_gradient(margins), xp)
    return objective.reduce(objective.pair_losses(margins, beta, gamma, "sigmoid", 0.0, xp), reduction, xp)


def _adaptive_targets(margins: Array, xp: Namespace) -> Array:
    """[M < mu] * exp((mu - M) / s * mu), (N,): 0 for all pairs where they are equal, and so for one pair alone."""
    mean = xp.mean(margins)
    squares = xp.sum((margins - mean) ** 2) / max(1, margins.shape[0] - 1)
    below = (margins < mean) & (squares > 0)
    spread = xp.sqrt(xp.where(squares > 0, squares, xp.ones_like(squares)))
    exponent = xp.where(below, (mean - margins) / spread * mean, xp.zeros_like(margins))
    # exp overflows float32 at 88; the gradient of such a pair is saturated long before
    exponent = xp.where(exponent > _LARGEST_EXPONENT, _LARGEST_EXPONENT * xp.ones_like(exponent), exponent)
    return xp.where(below, xp.exp(exponent), xp.zeros_like(margins))
