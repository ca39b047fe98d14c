"""The probability that a label is wrong, from scores that change sign with the label; nobody says which are wrong.

A pair's scores x (features,) are odd: with the two answers swapped they are -x. Policies that did not train on the pair
measure them, so that they do not depend on the pair's own label. With s = 1 / (1 + exp(-b x)) the label is as it is
with probability `q = L + (1 - 2 L) s`. The labels themselves thus tell b, by what predicts them, and the lapse rate L,
by how many stay contradicted where the prediction is surest.

L and b trade off: where predictions are never sure, many L fit the labels about as well. So no single L is taken. All
of a grid are, each with its likeliest b, weighted by its posterior: a uniform prior on L, one on b halfway between the
flat one and Jeffreys', Laplace's approximation in b.

A lapse is a wrong label or a sure but wrong prediction, and nothing in the labels can tell one from the other. With e
the share of wrong labels and u that of the policies' own lapses, L = e + u - 2 e u, and the chosen answer is truly the
better one with probability r = u + (1 - 2 u) s. So u is taken to be anything from 0 to `MOST_LAPSES`, the smaller the
likelier (a triangle), as far as L allows. A label is then wrong with probability `e (1 - r) / q`; that, and the share
e, are means over what L and u may be.

The model of L is that of symmetric label noise (Natarajan et al. 2013), in psychometrics of the lapse rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Lapse rates. At one half the labels say nothing, and beyond it they would be those of the other answer.
LAPSES = np.linspace(0.005, 0.495, 50)
MOST_LAPSES = 0.2  # of the policies alone
_OWN = np.linspace(0, MOST_LAPSES, 21)[:-1]
_STEPS, _CLOSE = 100, 1e-4  # of a fit; nats, of all pairs together
_PRIOR = 0.25  # precision of a normal prior on b, of scores of unit size; it holds b where pairs say little of it


@dataclass(frozen=True)
class NoiseModel:
    """What a set of pairs says.

    Attributes:
        coefficients: (lapses, features) b for each of `LAPSES`.
        weights: (lapses,) posterior of L; sums to 1.
    """

    coefficients: np.ndarray
    weights: np.ndarray

    @property
    def lapses(self) -> float:
        """The posterior's mean of L: the share of labels that the surest predictions contradict."""
        return float(self.weights @ LAPSES)

    @property
    def share(self) -> float:
        """The posterior's mean of e, the share of wrong labels."""
        shares, weights = self._shares()
        return float(np.sum(weights * shares))

    def share_interval(self, level: float = 0.95) -> tuple[float, float]:
        """The (low, high) between which e lies with probability `level` at least.

        `low` is a quantile of e. `high` is one of L, which e is where the policies never lapse: a quantile of e would
        leave that case out.
        """
        shares, weights = self._shares()
        low = _quantile((1 - level) / 2, shares.ravel(), weights.ravel())
        return low, max(low, _quantile((1 + level) / 2, LAPSES, self.weights))

    def log_odds(self, x: np.ndarray) -> np.ndarray:
        """(n,) log-odds that the chosen answer is the better one, its label unseen; from x (n, features)."""
        odds: np.ndarray = np.asarray(x, dtype=float) @ (self.weights @ self.coefficients)
        return odds

    def p_wrong(self, x: np.ndarray) -> np.ndarray:
        """(n,) probability that each label is wrong; from x (n, features)."""
        shares, weights = self._shares()
        wrong = np.zeros(len(x))
        for i in np.flatnonzero(weights.sum(1) > 1e-6):
            right = _sigmoid(x @ self.coefficients[i])
            # e (1 - r) is linear in s, so that the mean over u is that of its two coefficients.
            constant, slope = weights[i] @ (shares[i] * (1 - _OWN)), weights[i] @ (shares[i] * (1 - 2 * _OWN))
            wrong += (constant - slope * right) / _as_it_is(right, LAPSES[i])
        return np.clip(wrong, 0, 1)

    def _shares(self) -> tuple[np.ndarray, np.ndarray]:
        """e for each of `LAPSES` (rows) and each of the policies' own (columns), and its weight; all sum to 1."""
        shares = (LAPSES[:, None] - _OWN) / (1 - 2 * _OWN)
        possible = shares >= 0
        likely = possible * (1 - _OWN / MOST_LAPSES)
        weights = self.weights[:, None] * likely / likely.sum(1, keepdims=True)
        return np.where(possible, shares, 0.0), weights / weights.sum()


def _quantile(level: float, values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    below = np.cumsum(weights[order]) - weights[order] / 2
    return float(np.interp(level, below, values[order]))


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
    for lapses in LAPSES:
        b, value, information = _climb(x, lapses, b)
        coefficients.append(b)
        reached.append((value, np.linalg.slogdet(information)[1]))
    values, volumes = np.array(reached).T
    best = int(np.argmax(values))
    effect = 1.0 if groups is None else _design_effect(x, LAPSES[best], coefficients[best], groups)
    log_weights = len(x) / effect * (values - values[best]) - volumes / 4
    weights = np.exp(log_weights - log_weights.max())
    return NoiseModel(np.array(coefficients), weights / weights.sum())


def _climb(x: np.ndarray, lapses: float, b: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """The likeliest b for a lapse rate, climbed to from b; its mean log-likelihood with the prior, and its information.

    Fisher scoring with damping. A pair is a draw of "label as it is" with probability q, so that its information is
    (grad q)(grad q)' / (q (1 - q)), which is never negative.
    """
    n, eye = len(x), np.eye(x.shape[1])
    value, damping = _likelihood(x, lapses, b), 1e-3
    while True:
        right = _sigmoid(x @ b)
        q = _as_it_is(right, lapses)
        slope = (1 - 2 * lapses) * right * (1 - right)
        gradient = x.T @ (slope / q) / n - _PRIOR / n * b
        information = (x * (slope**2 / (q * (1 - q)))[:, None]).T @ x / n + _PRIOR / n * eye
        gain = 0.0
        for _ in range(_STEPS):
            step = np.linalg.solve(information + damping * np.diag(np.diag(information)), gradient)
            reached = _likelihood(x, lapses, b + step)
            if reached >= value:
                gain, b, value, damping = reached - value, b + step, reached, max(damping / 10, 1e-9)
                break
            damping *= 10
        if n * gain < _CLOSE:
            return b, value, information


def _likelihood(x: np.ndarray, lapses: float, b: np.ndarray) -> float:
    return float(np.mean(np.log(_as_it_is(_sigmoid(x @ b), lapses))) - _PRIOR / len(x) / 2 * b @ b)


def _as_it_is(right: np.ndarray, lapses: float) -> np.ndarray:
    """Probability of the label as it is, where the chosen answer is the better one with probability `right`."""
    return lapses + (1 - 2 * lapses) * right


def _design_effect(x: np.ndarray, lapses: float, b: np.ndarray, groups: np.ndarray) -> float:
    """How many pairs of these groups say as much as one of independent ones; at least 1.

    The variance of the score (the likelihood's slope), summed by groups, over that by pairs: Huber's sandwich, averaged
    over the parameters.
    """
    right = _sigmoid(x @ b)
    q = _as_it_is(right, lapses)
    by_odds, by_lapses = (1 - 2 * lapses) * right * (1 - right) / q, (1 - 2 * right) / q
    slopes = np.concatenate([by_odds[:, None] * x, by_lapses[:, None]], 1)
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
