"""The probability that a label is wrong, from scores that change sign with the label; nobody says which are wrong.

A pair's scores x (features,) are odd: with the two answers swapped they are -x. A policy that did not train on the pair
measures them, so that they do not depend on the pair's own label. With s = 1 / (1 + exp(-b x)) the chance that the
chosen answer is truly the better one, and e the chance that a label is wrong, whatever the pair, the label is as it is
with probability `q = (1 - e) s + e (1 - s)`. The labels themselves thus tell b, by what predicts them, and e, by how
many stay contradicted where the prediction is surest. A label is wrong with probability `e (1 - s) / q`.

e and b trade off: where predictions are never sure, many shares fit the labels about as well. So no single e is taken.
All of a grid are, each with its likeliest b, weighted by the likelihood that the two reach (the profile likelihood,
taken as a posterior under a uniform prior on e). The share has this posterior's interval, and `p_wrong` is its mean.

That e can be told at all rests on the logistic form: a policy that is surely wrong about right labels looks the same as
wrong labels. The model is that of symmetric label noise (Natarajan et al. 2013); psychometrics calls e a lapse rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# At one half the labels say nothing, and beyond it they would be those of the other answer.
SHARES = np.linspace(0.0025, 0.4975, 100)
_STEPS, _CLOSE = 100, 1e-9  # of a fit; nats per pair
_PRIOR = 0.04  # precision of a normal prior on b, of scores of unit size: it holds b where all pairs agree


@dataclass(frozen=True)
class NoiseModel:
    """What a set of pairs says of b and e.

    Attributes:
        coefficients: (shares, features) b for each of `SHARES`.
        weights: (shares,) posterior of e; sums to 1.
    """

    coefficients: np.ndarray
    weights: np.ndarray

    @property
    def share(self) -> float:
        """The posterior's mean of e, the share of wrong labels."""
        return float(self.weights @ SHARES)

    def share_interval(self, level: float = 0.95) -> tuple[float, float]:
        """The (low, high) between which e lies with probability `level`."""
        edges = np.linspace(0, 0.5, len(SHARES) + 1)
        below = np.concatenate([[0.0], np.cumsum(self.weights)])
        low, high = np.interp([(1 - level) / 2, (1 + level) / 2], below, edges)
        return float(low), float(high)

    def log_odds(self, x: np.ndarray) -> np.ndarray:
        """(n,) log-odds that the chosen answer is the better one, its label unseen; from x (n, features)."""
        odds: np.ndarray = np.asarray(x, dtype=float) @ (self.weights @ self.coefficients)
        return odds

    def p_wrong(self, x: np.ndarray) -> np.ndarray:
        """(n,) probability that each label is wrong; from x (n, features)."""
        wrong = np.zeros(len(x))
        for share, b, weight in zip(SHARES, self.coefficients, self.weights, strict=True):
            if weight > 1e-6:
                right = _sigmoid(x @ b)
                wrong += weight * share * (1 - right) / _as_it_is(right, share)
        return np.clip(wrong / self.weights[self.weights > 1e-6].sum(), 0, 1)


def fit(x: np.ndarray, groups: np.ndarray | None = None) -> NoiseModel:
    """The model of these pairs.

    Args:
        x: (n, features) odd scores of about unit size (`unit_size`).
        groups: (n,) numbers from 0 of the pairs' groups, such as their prompts. Pairs of one group say less than as
            many of different ones. None where no two pairs share a group.

    Raises:
        ValueError: there is no pair, or a score is not finite.
    """
    x = np.asarray(x, dtype=float)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"the model needs pairs of finite scores, got {len(x)} pairs")
    b = np.zeros(x.shape[1])
    coefficients, reached = [], []
    for share in SHARES:
        b, value = _climb(x, share, b)
        coefficients.append(b)
        reached.append(value)
    values = np.array(reached)
    best = int(np.argmax(values))
    effect = 1.0 if groups is None else _design_effect(x, SHARES[best], coefficients[best], groups)
    weights = np.exp(len(x) / effect * (values - values[best]))
    return NoiseModel(np.array(coefficients), weights / weights.sum())


def _climb(x: np.ndarray, share: float, b: np.ndarray) -> tuple[np.ndarray, float]:
    """The likeliest b for a share, climbed to from b, and its mean log-likelihood with the prior, nats per pair.

    Fisher scoring with damping. A pair is a draw of "label as it is" with probability q, so that its information is
    (grad q)(grad q)' / (q (1 - q)), which is never negative.
    """
    n, eye = len(x), np.eye(x.shape[1])
    value, damping = _likelihood(x, share, b), 1e-3
    while True:
        right = _sigmoid(x @ b)
        q = _as_it_is(right, share)
        slope = (1 - 2 * share) * right * (1 - right)
        gradient = x.T @ (slope / q) / n - _PRIOR / n * b
        information = (x * (slope**2 / (q * (1 - q)))[:, None]).T @ x / n + _PRIOR / n * eye
        gain = 0.0
        for _ in range(_STEPS):
            step = np.linalg.solve(information + damping * np.diag(np.diag(information)), gradient)
            reached = _likelihood(x, share, b + step)
            if reached >= value:
                gain, b, value, damping = reached - value, b + step, reached, max(damping / 10, 1e-9)
                break
            damping *= 10
        if gain < _CLOSE:
            return b, value


def _likelihood(x: np.ndarray, share: float, b: np.ndarray) -> float:
    return float(np.mean(np.log(_as_it_is(_sigmoid(x @ b), share))) - _PRIOR / len(x) / 2 * b @ b)


def _as_it_is(right: np.ndarray, share: float) -> np.ndarray:
    """Probability of the label as it is, where the chosen answer is the better one with probability `right`."""
    return share + (1 - 2 * share) * right


def _design_effect(x: np.ndarray, share: float, b: np.ndarray, groups: np.ndarray) -> float:
    """How many pairs of these groups say as much as one of independent ones; at least 1.

    The variance of the score (the likelihood's slope), summed by groups, over that by pairs: Huber's sandwich, averaged
    over the parameters.
    """
    right = _sigmoid(x @ b)
    q = _as_it_is(right, share)
    by_odds, by_share = (1 - 2 * share) * right * (1 - right) / q, (1 - 2 * right) / q
    slopes = np.concatenate([by_odds[:, None] * x, by_share[:, None]], 1)
    slopes -= slopes.mean(0)
    by_group = np.stack([np.bincount(groups, column) for column in slopes.T], 1)
    alone, together = slopes.T @ slopes, by_group.T @ by_group
    scale = np.trace(alone) * 1e-12 * np.eye(len(alone))
    return max(1.0, float(np.trace(np.linalg.solve(alone + scale, together)) / len(alone)))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    values: np.ndarray = 0.5 * (1 + np.tanh(0.5 * z))
    return values


def unit_size(scores: np.ndarray) -> np.ndarray:
    """`scores` (n, ...) over their root mean square along the first axis. Nothing is subtracted: they stay odd."""
    size = np.sqrt(np.mean(np.square(scores), 0, keepdims=True))
    scaled: np.ndarray = scores / np.where(size > 0, size, 1.0)
    return scaled
