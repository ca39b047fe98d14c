"""Objectives that set a pair's target, its weight or the temperature by the other pairs, or by past batches.

Means and deviations are over the pairs of all ranks. Running ones pass from step to step; in an evaluation and in the
functions of arrays there are none, and the batch's own stand in their place. Nothing of this carries gradient.
"""

from __future__ import annotations

import warnings

from gapo._namespace import Array, is_concrete, stop_gradient
from gapo.objective import logistic, pair_losses, sigmoid
from gapo.objectives.formulas import objective
from gapo.pairs import LogProbs

_LARGEST_EXPONENT = 60.0
_LEAST_BETA = 1e-3  # of beta-DPO, as in its authors' code
_FEW_PAIRS = 8
_warned: set[str] = set()


@objective(paper="Deng, Feng, Lei, arXiv 2511.09385", average=True, of_margins=True, batch_statistics=True)
def amapo(logps: LogProbs, *, beta: float = 2.0) -> Array:
    """AMaPO: SimPO with a target of each pair's own, larger the further the pair lags behind its batch.

    `-log sigmoid(beta * M - m)`, with the constant `m = beta * [M < mu] * exp((mu - M) / s * mu)`, where mu and s are
    the mean and the sample standard deviation of M over the batch, all ranks. A pair at or above the mean has the
    target 0.

    Args:
        beta: logistic temperature, > 0.

    Source: Deng, Feng, Lei, arXiv 2511.09385; beta 2 is its recipe for Mistral-7B, of 2 to 3 overall.

    >>> import numpy as np
    >>> round(float(amapo(np.array([-1.0]), np.array([-1.0]))), 4)
    0.6931
    """
    xp, margins = logps.xp, logps.margins
    warn_of_few_pairs("amapo", logps, margins)
    scores = logps.zscore(margins)
    exponents = -scores * logps.mean(margins)
    # exp overflows float32 at 88; the gradient of such a pair is saturated long before
    exponents = xp.where(exponents > _LARGEST_EXPONENT, _LARGEST_EXPONENT * xp.ones_like(scores), exponents)
    targets = xp.where(scores < 0, xp.exp(exponents), xp.zeros_like(scores))
    return pair_losses(margins, beta, beta * targets, "sigmoid", 0.0, xp)


@objective(paper="Cao et al., arXiv 2509.24159", needs_reference=True, batch_statistics=True)
def re_po(logps: LogProbs, *, beta: float = 0.1, reliability: float = 0.9, rate: float = 0.1) -> Array:
    """RE-PO on DPO: `-w log p - (1 - w) log(1 - p)`, p = `sigmoid(beta * z)`, w the probability that the label is true.

    `w = eta p / (eta p + (1 - eta)(1 - p))`, a constant. eta, the share of true labels, starts at `reliability` and
    runs: after each batch it is `(1 - rate) * eta + rate * mean w`. The gradient is that of the likelihood of a label
    that is true with probability eta, `-log(eta p + (1 - eta)(1 - p))`.

    Args:
        beta: as in `dpo`.
        reliability: the first eta, in (0, 1).
        rate: share of a batch in eta, in (0, 1].

    Source: Cao et al., arXiv 2509.24159, with one eta for all annotators.
    """
    return label_likelihood(logps, beta, reliability, rate, doubt=0.0)


def label_likelihood(logps: LogProbs, beta: float, reliability: float, rate: float, doubt: Array | float) -> Array:
    """RE-PO's losses (N,), with `doubt` (N,) taken from the logit of each label's posterior probability, w."""
    xp, x = logps.xp, beta * logps.z
    # eta as it stands; it is recorded below, once w is there
    eta = logps.running("reliability", logps.mean(x), initial=reliability, rate=0.0)
    eta = xp.clip(eta, 1e-6, 1 - 1e-6)
    w = sigmoid(xp.log(eta) - xp.log(1 - eta) + stop_gradient(x) - doubt, xp)
    logps.running("reliability", logps.mean(w), initial=reliability, rate=rate)
    return w * logistic(x, xp) + (1 - w) * logistic(-x, xp)


@objective(paper="Wu et al., arXiv 2410.10148", needs_reference=True, average=True, batch_statistics=True)
def alpha_dpo(
    logps: LogProbs, *, beta: float = 2.5, gamma: float | Array = 0.375, alpha: float = 0.05, rate: float = 0.1
) -> Array:
    """alpha-DPO: SimPO whose target rises with the pair's log-ratio, on LENGTH-NORMALISED log-probabilities.

    `-log sigmoid(beta * (M - alpha * (z - mu) / s) - gamma)`, where z is the margin over the reference's, and mu and s
    are the moving averages of its mean and sample standard deviation in a batch. The target is a constant.

    Args:
        beta: logistic temperature, > 0.
        gamma: target margin times beta: a float, or (N,) one for each pair.
        alpha: > 0; without it this is SimPO.
        rate: share of a batch in the moving averages, in (0, 1].

    Source: Wu et al., arXiv 2410.10148, and its authors' settings for Mistral-7B-Instruct; for Llama-3-8B-Instruct they
    take beta 2.5, gamma 1.5 and alpha 0.2. Their code starts both averages at 0, which makes the first steps' targets
    up to ten times as large. Here the averages are of the batches seen.
    """
    xp, z = logps.xp, logps.z_per_token
    warn_of_few_pairs("alpha_dpo", logps, z)
    mean, spread = _moving_averages(logps, rate, mean=logps.mean(z), deviation=logps.deviation(z))
    some = spread > 0  # before the first step the policy is the reference
    scores = (stop_gradient(z) - mean) / xp.where(some, spread, xp.ones_like(spread))
    targets = gamma + beta * alpha * xp.where(some, scores, xp.zeros_like(scores))
    return pair_losses(logps.margins, beta, targets, "sigmoid", 0.0, xp)


@objective(paper="Wu et al., arXiv 2407.08639", needs_reference=True, batch_statistics=True)
def beta_dpo(logps: LogProbs, *, beta: float = 0.1, alpha: float = 0.6, keep: float = 0.8, rate: float = 0.1) -> Array:
    """beta-DPO: DPO on the pairs of ordinary z, with a beta of each batch's own.

    `-log sigmoid(beta' * z)` for the share `keep` of the pairs nearest to mu, and 0 for the others, times N over the
    number of those. mu is the moving average of the mean z, and `beta' = beta * (1 + alpha * (mean z kept - mu))`, a
    constant >= 0.001.

    Args:
        beta: as in `dpo`.
        alpha: how far beta follows the batch, > 0.
        keep: share of the pairs that stay, in (0, 1], of each rank's own; one stays at least.
        rate: share of a batch in the moving average, in (0, 1].

    Source: Wu et al., arXiv 2407.08639, and its authors' settings. They draw the pairs that stay, each with a chance by
    its Gaussian density; here those of the largest density stay. Their moving average starts at 0; here it is of the
    batches seen.
    """
    xp, z = logps.xp, logps.z
    warn_of_few_pairs("beta_dpo", logps, z)
    (mean,) = _moving_averages(logps, rate, mean=logps.mean(z))
    distances = xp.abs(stop_gradient(z) - mean)
    last = xp.sort(distances)[max(1, int(keep * z.shape[0] + 1e-9)) - 1]
    stays = xp.astype(distances <= last, z.dtype)
    share = logps.mean(stays)
    scaled = beta * (1 + alpha * (logps.mean(stays * z) / share - mean))
    scaled = xp.where(scaled > _LEAST_BETA, scaled, _LEAST_BETA * xp.ones_like(scaled))
    return stays / share * logistic(scaled * z, xp)


def _moving_averages(logps: LogProbs, rate: float, **values: Array) -> list[Array]:
    """Moving averages of scalars up to this batch, without the pull towards their start (as Adam corrects its own)."""
    weight = logps.xp.ones_like(next(iter(values.values())))
    for name, value in {**values, "weight": weight}.items():
        logps.running(name, value, initial=0.0, rate=rate)
    return [logps.recorded[name] / logps.recorded["weight"] for name in values]


def warn_of_few_pairs(name: str, logps: LogProbs, x: Array) -> None:
    """Warn once for each objective that takes a mean or a deviation of fewer than 8 pairs, those of all ranks.

    Silent where a compiled step cannot read their number.
    """
    if x.shape[0] >= _FEW_PAIRS:
        return
    pairs = logps.pairs_in_batch(x)
    if name not in _warned and is_concrete(pairs) and float(pairs) < _FEW_PAIRS:
        _warned.add(name)
        warnings.warn(
            f"objective {name!r} compares each pair with the others of its micro-batch, over all devices, and here "
            f"these are {int(pairs)}, fewer than {_FEW_PAIRS}: raise the batch size of a device; gradient accumulation "
            "adds none",
            RuntimeWarning,
            stacklevel=4,
        )
