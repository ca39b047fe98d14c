"""Options of how a batch's log-probabilities are measured and its pairs weighted: LD-DPO's alpha and WPO's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gapo._fields import described
from gapo._namespace import Array, is_concrete, namespace
from gapo.columns import REFERENCE, REFERENCE_ALPHA, halves
from gapo.logps import sequence_logps
from gapo.objective import require_number
from gapo.token_weights import ld_weights, wpo_weights


@dataclass(frozen=True)
@described
class LogpOptions:
    """How the policy's log-probabilities are measured, and whether its pairs are weighted.

    Attributes:
        ld_alpha: LD-DPO's alpha in [0, 1], as in `gapo.token_weights.ld_weights`; None for 1.
        use_weighting: whether each pair's loss counts `gapo.token_weights.wpo_weights` times, without a cap, as TRL's
            does.

    Raises:
        ValueError: an option is out of its range.
    """

    ld_alpha: float | None = None
    use_weighting: bool = False

    def __post_init__(self) -> None:
        if self.ld_alpha is not None:
            require_number("ld_alpha", self.ld_alpha, "in [0, 1], or None", lambda v: 0 <= v <= 1)
        if not isinstance(self.use_weighting, bool):
            raise ValueError(f"use_weighting must be True or False, got {self.use_weighting!r}")

    @property
    def alpha(self) -> float | None:
        """`ld_alpha`, or None where it changes nothing."""
        return None if self.ld_alpha == 1 else self.ld_alpha

    def require_weightable(self, name: str, coupled: bool) -> None:
        """Raise ValueError where pairs have no loss each: the objective `name` is `coupled`."""
        if self.use_weighting and coupled:
            raise ValueError(
                f"use_weighting weights the loss of each pair, and objective {name!r} is one loss of its whole "
                "batch: leave it out, or choose an objective whose pairs have a loss each"
            )

    def logps(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """(chosen_logps, rejected_logps), each (N,), nats per token, of logits (2N, seq, vocab), labels (2N, seq)."""
        weights = None if self.alpha is None else ld_weights(labels, self.alpha)
        return halves(sequence_logps(logits, labels, token_weights=weights))

    def pair_weights(self, logits: Array, labels: Array) -> Array | None:
        """The factor of each pair's loss (N,), without gradient; None where there is none."""
        return wpo_weights(logits, labels, cap=None) if self.use_weighting else None

    def checked(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """`batch`, whose reference log-probabilities, if it has any, were measured with the same alpha.

        Raises:
            ValueError: they were not. Where values cannot be read, as under `jax.jit`, they are NaN instead.
        """
        if not any(name in batch for name in REFERENCE):
            return batch
        measured = batch.get(REFERENCE_ALPHA)
        if (measured is None) != (self.alpha is None):
            raise ValueError(self._mismatch("None" if measured is None else f"the column {REFERENCE_ALPHA!r}"))
        if measured is None:
            return batch
        xp = namespace(measured=measured)
        same = xp.abs(measured - self.alpha) < _SAME
        if is_concrete(same):
            if not bool(xp.all(same)):
                raise ValueError(self._mismatch(f"{float(xp.min(measured)):.6g} to {float(xp.max(measured)):.6g}"))
            return batch
        nowhere = float("nan") * xp.ones_like(measured)
        return {**batch, **{name: xp.where(same, batch[name], nowhere) for name in REFERENCE if name in batch}}

    def _mismatch(self, measured: str) -> str:
        return (
            f"the policy is measured with ld_alpha={self.ld_alpha!r}, and the batch's reference log-probabilities with "
            f"{measured}: their difference would be of two sums. Measure the reference with the same, by "
            f"with_reference_logps(..., ld_alpha={self.ld_alpha!r})"
        )


_SAME = 1e-6  # alphas travel as float32


class PairLogps:
    """A margin function of (model, batch) with options, which remembers the weights of one clean forward.

    An engine may run the function several times in a step: again, at the anchor, on a stand-in of the batch. The
    weights are those of the first call on the very batch that `await_batch` named.

    Args:
        logits_of: `logits_of(model, batch)` gives (logits (2N, seq, vocab), labels (2N, seq)).
        options: of the measuring.
    """

    by_pairs = True  # as `gapo.backends.base.by_pairs` says

    def __init__(self, logits_of: Callable[[Any, Any], tuple[Array, Array]], options: LogpOptions) -> None:
        self._logits_of, self.options = logits_of, options
        self._awaited: dict[str, Any] = {}  # the batch, then its weights

    def await_batch(self, batch: Any) -> None:
        """Remember the weights of the next call on `batch`."""
        self._awaited = {"batch": batch} if self.options.use_weighting else {}

    def pair_weights(self) -> Array | None:
        """The weights (N,) of that call, once; None without weighting."""
        return self._awaited.pop("weights", None)

    def __call__(self, model: Any, batch: Any) -> tuple[Array, Array]:
        logits, labels = self._logits_of(model, batch)
        if self._awaited.get("batch") is batch and batch is not None:
            self._awaited = {"weights": self.options.pair_weights(logits, labels)}
        return self.options.logps(logits, labels)


__all__ = ["LogpOptions", "PairLogps"]
