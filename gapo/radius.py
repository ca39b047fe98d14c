"""A radius that sets itself: rho from `target_gap`, the spread that the anchor gaps of a batch are to have.

To first order every gap is linear in rho, and so is their spread: the RMS of the gaps about their mean, over the pairs
of all ranks. The spread is what tells pairs apart: to first order a weight varies by `beta` times it. A shift that all
gaps share changes all weights alike. As it is made of sums, ranks need not hold equally many pairs.
"""

from __future__ import annotations

from gapo._namespace import Array, Namespace, rounding_unit, stop_gradient
from gapo.backends.base import Backend
from gapo.batch_statistics import BatchStatistics

# Spreads of so many units of rounding are none: one pair, both answers alike, a gradient of 0.
_NOISE = 32
# One secant step changes rho by a factor of at most so much, either way.
_MOST = 4.0


class Spread(BatchStatistics):
    """Spreads over the pairs of all ranks."""

    def __init__(self, backend: Backend) -> None:
        self.xp = backend.xp
        self._count_over(backend.all_reduce, None)

    def of(self, gaps: Array) -> Array:
        """RMS of `gaps` (N,) about their mean, a scalar: what is logged as `gapo/anchor_gap_std`."""
        centred = stop_gradient(gaps) - self.mean(gaps)
        return self.xp.sqrt(self.mean(centred * centred))

    def first_order_rho(self, unit_gaps: Array, target: float) -> Array:
        """The radius at which first-order gaps spread by `target`, a scalar; 0 where they do not spread at all.

        Args:
            unit_gaps: (N,) first-order gaps at radius 1, nats per token.
            target: nats per token.
        """
        xp = self.xp
        spread = self.of(unit_gaps)
        size = self._reduce(xp.max(xp.abs(unit_gaps)), "max")
        none = spread <= _NOISE * rounding_unit(unit_gaps, xp) * xp.where(size > 1, size, xp.ones_like(size))
        return xp.where(none, xp.zeros_like(spread), target / xp.where(none, xp.ones_like(spread), spread))

    def corrected_rho(self, rho: Array, gaps: Array, target: float) -> Array:
        """The radius by one secant step from `rho`, a scalar, where the exact `gaps` (N,) were measured.

        `rho` is first order's, so that two values of rho / spread are known: target's at 0, and the measured one here.
        """
        xp = self.xp
        return rho * secant_factor(self.of(gaps) / target, xp)


def secant_factor(ratio: Array, xp: Namespace) -> Array:
    """By how much to multiply a radius at which the spread is `ratio` times the target, and first order's the target.

    With x the factor, rho / spread is taken as linear in rho: `x = ratio / (2 ratio - 1)`. Where the spread outgrows
    first order it is taken as quadratic: `x + (ratio - 1) x^2 = 1`. Both agree to second order around 1.
    """
    excess = xp.where(ratio > 1, ratio - 1, xp.zeros_like(ratio))
    outgrown = 2 / (1 + xp.sqrt(1 + 4 * excess))
    # Below 4/7 the factor would pass 4: kept there, the division has no pole.
    lacking = xp.where(ratio < _MOST / (2 * _MOST - 1), ratio * 0 + _MOST / (2 * _MOST - 1), ratio)
    factor = xp.where(ratio > 1, outgrown, lacking / (2 * lacking - 1))
    return xp.where(factor < 1 / _MOST, factor * 0 + 1 / _MOST, factor)
