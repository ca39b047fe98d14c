"""Statistics over the pairs of a batch, and running ones from step to step, for objectives that use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gapo._namespace import Array, Namespace, at_least_float32, rounding_unit, stop_gradient

# `reduce(x, op)` over the data-parallel ranks, with op "sum" or "max", as `gapo.backends.base.Backend.all_reduce`.
Reduce = Callable[[Array, str], Array]

_NOISE = 16  # units of rounding of the largest entry


class BatchStatistics:
    """What a `LogProbs` tells of its whole batch: the pairs of all data-parallel ranks. Nothing here carries gradient.

    Attributes:
        xp: the Array-API namespace of the arrays.
        recorded: the running statistics as they stand after this batch, scalars by name.
    """

    xp: Namespace
    recorded: dict[str, Array]
    _before: Mapping[str, Array]
    _reduce: Reduce

    def _count_over(self, reduce: Reduce | None, running: Mapping[str, Array] | None) -> None:
        """Take the pairs of all ranks by `reduce`, None for one rank; `running` is what the last batch recorded."""
        self._reduce = reduce or _of_one_rank
        self._before = running or {}
        self.recorded = {}

    def pairs_in_batch(self, x: Array) -> Array:
        """Number of pairs over all ranks, a scalar of the dtype of `x` (N,)."""
        return self._reduce(self.xp.sum(self.xp.ones_like(stop_gradient(x))), "sum")

    def mean(self, x: Array) -> Array:
        """Mean of `x` (N,) over the pairs of all ranks, a scalar."""
        return self._reduce(self.xp.sum(stop_gradient(x)), "sum") / self.pairs_in_batch(x)

    def deviation(self, x: Array) -> Array:
        """Sample standard deviation of `x` (N,) over the pairs of all ranks, a scalar.

        It is 0 for one pair, and where the pairs differ by no more than rounding.
        """
        return self._centred(x)[1]

    def zscore(self, x: Array) -> Array:
        """`(x - mean) / deviation` of `x` (N,); 0 where all pairs of the batch are equal."""
        xp = self.xp
        centred, spread = self._centred(x)
        some = spread > 0
        return xp.where(some, centred / xp.where(some, spread, xp.ones_like(spread)), xp.zeros_like(centred))

    def _centred(self, x: Array) -> tuple[Array, Array]:
        """`x` (N,) without its mean, and its `deviation`."""
        xp, x = self.xp, stop_gradient(x)
        pairs = self.pairs_in_batch(x)
        centred = x - self._reduce(xp.sum(x), "sum") / pairs
        others = pairs - 1
        variance = self._reduce(xp.sum(centred**2), "sum") / xp.where(others > 0, others, xp.ones_like(others))
        rounding = _NOISE * rounding_unit(x, xp) * self._reduce(xp.max(xp.abs(x)), "max")
        deviation = xp.sqrt(variance)
        return centred, xp.where(deviation > rounding, deviation, xp.zeros_like(deviation))

    def weights_of_mean_one(self, log_weights: Array) -> Array:
        """Weights (N,) from their logarithms, divided by their mean over the pairs of all ranks.

        The scaling happens in the logarithm, so that weights that would all underflow still have a ratio.
        """
        xp, logs = self.xp, stop_gradient(log_weights)
        scaled = xp.exp(logs - self._reduce(xp.max(logs), "max"))
        return scaled / self.mean(scaled)

    def running(self, name: str, value: Array, *, initial: float, rate: float) -> Array:
        """A running statistic as it stood before this batch, a scalar.

        It records `(1 - rate) * before + rate * value` for the next step, which takes it by its `running` argument.

        Args:
            name: of the statistic, among those of the objective.
            value: scalar, of this batch. Take it over all ranks, as `mean` does, or each rank runs its own.
            initial: where it starts. It also stands where nothing runs: in an evaluation and in a bare `LogProbs`.
            rate: share of this batch in the new value, in [0, 1].
        """
        value = at_least_float32(stop_gradient(value), self.xp)
        before = self._before.get(name, initial)
        before = self.xp.ones_like(value) * before if isinstance(before, (int, float)) else stop_gradient(before)
        self.recorded[name] = (1 - rate) * before + rate * value
        return before


def _of_one_rank(x: Array, op: str) -> Array:
    return x
