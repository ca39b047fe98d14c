"""The batch of pairs: the names of its columns, its rows stacked for one forward, and its log-probabilities.

A batch is a mapping. Its columns are `{side}_{part}`, each (N, seq), and, where a reference was measured, `REFERENCE`,
each (N,). One forward takes both sides at once, the chosen rows above the rejected ones: row r belongs to pair r mod N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gapo._namespace import Array, at_least_float32, like, namespace, stop_gradient
from gapo.batch_statistics import BatchStatistics, Reduce
from gapo.columns import (
    ANCHOR,
    COLUMNS,
    LENGTHS,
    PARTS,
    REFERENCE,
    SIDES,
    BatchConstants,
    halves,
    require_reference,
    stacked,
)
from gapo.logp_options import LogpOptions
from gapo.objective import check_batches

_Arrays = Mapping[str, Array | None]


def pair_logps(
    logits_fn: Callable[..., Array], batch: Mapping[str, Array], *, ld_alpha: float | None = None
) -> tuple[Array, Array]:
    """(chosen_logps, rejected_logps), each (N,), nats per token, from one call of a model on both sides.

    Args:
        logits_fn: `logits_fn(input_ids, attention_mask)`, (2N, seq) each, gives logits (2N, seq, vocab).
        batch: the columns `COLUMNS`.
        ld_alpha: LD-DPO's alpha in [0, 1], as in `gapo.token_weights.ld_weights`; None for 1. The sums still divide by
            the whole response's number of tokens. A reference in the batch must be measured with the same.

    Raises:
        TypeError, ValueError: as `gapo.sequence_logps`; `ld_alpha` is out of its range, or not the reference's.
    """
    options = LogpOptions(ld_alpha)
    ids, mask, labels = stacked(options.checked(batch), *PARTS)
    return options.logps(logits_fn(ids, mask), labels)


class LogProbs(BatchStatistics):
    """What a batch of N pairs tells an objective. Log-probabilities are SUMMED over the response's tokens, nats.

    It is made of sums, as here, or of length-normalised log-probabilities (`from_averages`). Each is computed from the
    other, by the lengths, when it is asked for. Reference and anchor carry no gradient, ever. float16 and bfloat16 are
    widened to float32. Every argument is an attribute of the same name.

    Args:
        chosen: (N,) of each chosen response under the policy.
        rejected: (N,) of each rejected response under the policy.
        chosen_lengths: (N,) number of tokens of each chosen response, >= 1; integers or floats.
        rejected_lengths: (N,) the same of each rejected response.
        ref_chosen: (N,) of each chosen response under the reference; None where there is none.
        ref_rejected: (N,) of each rejected response under the reference.
        anchor_chosen: (N,) of each chosen response under the anchor; None where there is none.
        anchor_rejected: (N,) of each rejected response under the anchor.

    Attributes:
        xp: the Array-API namespace of the arrays.

    Raises:
        TypeError, ValueError: arrays of several libraries, not floating point, or of other shapes than (N,). When a
            value is asked for, ValueError: nothing that it is computed from is known.
    """

    def __init__(
        self,
        *,
        chosen: Array,
        rejected: Array,
        chosen_lengths: Array,
        rejected_lengths: Array,
        ref_chosen: Array | None = None,
        ref_rejected: Array | None = None,
        anchor_chosen: Array | None = None,
        anchor_rejected: Array | None = None,
    ) -> None:
        arrays = (chosen, rejected, ref_chosen, ref_rejected, anchor_chosen, anchor_rejected)
        lengths = dict(zip(SIDES, (chosen_lengths, rejected_lengths), strict=True))
        self._fill(dict(zip(_SIDES_UNDER, arrays, strict=True)), {}, lengths)

    @classmethod
    def from_averages(
        cls,
        chosen: Array,
        rejected: Array,
        lengths: Array | None = None,
        ref_chosen: Array | None = None,
        ref_rejected: Array | None = None,
    ) -> LogProbs:
        """From length-normalised log-probabilities under the policy.

        Args:
            chosen: (N,) nats per token.
            rejected: (N,) nats per token.
            lengths: (2N,) numbers of tokens, those of the chosen responses first; None if no sum will be asked for.
            ref_chosen: (N,) summed, nats, as the columns of a data set hold them; None without a reference.
            ref_rejected: (N,) likewise.
        """
        by_side = {} if lengths is None else dict(zip(SIDES, halves(lengths), strict=True))
        reference = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
        return cls.of_arrays(reference, {"chosen": chosen, "rejected": rejected}, by_side)

    @classmethod
    def of_step(
        cls,
        outputs: tuple[Array, ...],
        constants: BatchConstants,
        anchor_outputs: tuple[Array, ...] | None = None,
        anchor_gaps: Array | None = None,
        *,
        reduce: Reduce | None = None,
        running: Mapping[str, Array] | None = None,
    ) -> LogProbs:
        """What a step knows.

        Args:
            outputs: of the margin function, (margins,) or (chosen_logps, rejected_logps), (N,), nats per token.
            constants: of the batch.
            anchor_outputs: the same at the anchor; None for a first-order anchor, which has no log-probabilities.
            anchor_gaps: (N,) as the step measured them; None without an anchor.
            reduce: over the data-parallel ranks, `reduce(x, op)` with op "sum" or "max"; None for one rank.
            running: the running statistics that the last batch recorded, scalars by name; None at the first.
        """
        averages = dict(zip(SIDES if len(outputs) == 2 else ("margins",), outputs, strict=True))
        if constants.has_anchor:
            anchor_outputs = (constants.anchor_chosen, constants.anchor_rejected)
        if anchor_outputs is not None and len(anchor_outputs) == 2:
            averages |= {f"anchor_{side}": x for side, x in zip(SIDES, anchor_outputs, strict=True)}
        lengths = {"chosen": constants.chosen_lengths, "rejected": constants.rejected_lengths}
        sums = {"ref_chosen": constants.ref_chosen, "ref_rejected": constants.ref_rejected}
        logps = cls.of_arrays(sums, averages, lengths, anchor_gaps)
        logps._count_over(reduce, running)
        return logps

    @classmethod
    def of_arrays(cls, *arrays: Any) -> LogProbs:
        """From (sums, averages, lengths by side, anchor gaps), each a mapping by name but the last."""
        (logps := cls.__new__(cls))._fill(*arrays)
        return logps

    def _fill(self, sums: _Arrays, averages: _Arrays, lengths: _Arrays, anchor_gaps: Array | None = None) -> None:
        policy: Any = next(x for name, x in {**averages, **sums}.items() if name in ("margins", *SIDES))
        # Reference and lengths come with the batch, which may lie elsewhere than the policy.
        self._sums, self._averages, self._lengths = (
            {name: like(x, policy) for name, x in arrays.items() if x is not None}
            for arrays in (sums, averages, lengths)
        )
        self._count_over(None, None)
        self.xp = namespace(**self._averages, **self._sums)
        check_batches({**self._averages, **self._sums}, self.xp)
        for side, counts in self._lengths.items():
            if tuple(counts.shape) != tuple(policy.shape):  # others would broadcast
                raise ValueError(f"{side}_lengths must be {tuple(policy.shape)}, one for each pair, got {counts.shape}")
        for arrays in (self._sums, self._averages):
            for name, x in arrays.items():
                wide = at_least_float32(x, self.xp)
                arrays[name] = stop_gradient(wide) if name.startswith(("ref_", "anchor_")) else wide
        self._anchor_gaps = None if anchor_gaps is None else stop_gradient(anchor_gaps)
        self.shape = tuple(policy.shape)

    def __getattr__(self, name: str) -> Any:
        if name in _SIDES_UNDER:
            return self._sum(name)
        if name in LENGTHS:
            return self._lengths.get(name.partition("_")[0])
        raise AttributeError(f"LogProbs has no attribute {name!r}")

    def _sum(self, name: str) -> Any:
        if name in self._averages:
            return self._averages[name] * self._length(name)
        return self._stored(self._sums, name)

    def _average(self, name: str) -> Any:
        return self._sums[name] / self._length(name) if name in self._sums else self._stored(self._averages, name)

    def _stored(self, arrays: Mapping[str, Array], name: str) -> Any:
        if name in SIDES and name not in arrays:
            raise ValueError(
                "the objective needs log-probabilities of each response, and margin_fn returned margins alone: let it "
                "return (chosen_logps, rejected_logps)"
            )
        return arrays.get(name)

    def _length(self, name: str) -> Array:
        side = name.rpartition("_")[2]
        if side not in self._lengths:
            raise ValueError(
                f"the objective needs the number of tokens of each {side} response: let the batch hold {side}_labels "
                f"(N, seq) or {side}_lengths (N,)"
            )
        return self.xp.astype(self._lengths[side], next(iter({**self._averages, **self._sums}.values())).dtype)

    @property
    def margins(self) -> Any:
        """M (N,), the chosen minus the rejected response's length-normalised log-probability, nats per token."""
        return self._averages["margins"] if self.margins_alone else self._difference(self._average, "")

    @property
    def z(self) -> Any:
        """z (N,), the policy's margin minus the reference's, on summed log-probabilities, nats."""
        return self._difference(self._sum, "") - self._difference(self._sum, "ref_")

    @property
    def z_per_token(self) -> Any:
        """The same on length-normalised log-probabilities, nats per token."""
        return self.margins - self._difference(self._average, "ref_")

    @property
    def chosen_per_token(self) -> Any:
        """Length-normalised log-probability of each chosen response (N,), nats per token."""
        return self._average("chosen")

    @property
    def rejected_per_token(self) -> Any:
        """The same of each rejected response."""
        return self._average("rejected")

    @property
    def anchor_gaps(self) -> Any:
        """Anchor gaps (N,), M minus M at the anchor, nats per token; differentiable by way of M."""
        if self._anchor_gaps is None:
            return self.margins - self._difference(self._average, "anchor_")
        # A first-order gap is far smaller than M: it keeps its digits, and M lends its derivative.
        return self._anchor_gaps + (self.margins - stop_gradient(self.margins))

    @property
    def anchor_margins(self) -> Any:
        """M at the anchor (N,), nats per token, without gradient."""
        return stop_gradient(self.margins) - stop_gradient(self.anchor_gaps)

    @property
    def margins_alone(self) -> bool:
        """Whether nothing but margins is known of the policy."""
        return "margins" in self._averages

    def has(self, kind: str) -> bool:
        """Whether the log-probabilities under the "ref" or the "anchor" are known, or the anchor's gaps."""
        names = self._sums.keys() | self._averages.keys()
        return (kind == "anchor" and self._anchor_gaps is not None) or {f"{kind}_{side}" for side in SIDES} <= names

    def log_ratio_margins(self) -> Array | None:
        """`z`, or None where the reference or the numbers of tokens are unknown."""
        sums_known = "chosen" in self._sums or (len(self._lengths) == 2 and not self.margins_alone)
        return self.z if self.has("ref") and sums_known else None

    def pulled_by(self, weights: Array) -> LogProbs:
        """The same values, whose gradient is `weights` (N,) times what it was: for a loss of the batch as a whole."""

        def scaled(arrays: _Arrays) -> _Arrays:
            of_policy = {name: x for name, x in arrays.items() if name in ("margins", *SIDES)}
            fixed = {name: stop_gradient(x) for name, x in of_policy.items()}
            return {**arrays, **{name: fixed[name] + weights * (x - fixed[name]) for name, x in of_policy.items()}}

        return self._with(scaled(self._sums), scaled(self._averages))

    def per_token(self) -> LogProbs:
        """The same with every log-probability divided by its response's length: nats per token."""
        averages = {name: self._average(name) for name in (*self._sums, *self._averages)}
        return self._with(averages, {})

    def _with(self, sums: _Arrays, averages: _Arrays) -> LogProbs:
        """The same batch with other arrays."""
        logps = self.of_arrays(sums, averages, self._lengths, self._anchor_gaps)
        logps._count_over(self._reduce, self._before)
        logps.recorded = self.recorded
        return logps

    def _difference(self, read: Callable[[str], Any], prefix: str) -> Any:
        """The chosen minus the rejected side, under the policy, "ref_" or "anchor_"."""
        if prefix and not self.has(prefix.rstrip("_")):
            raise ValueError(_MISSING[prefix])
        return read(f"{prefix}chosen") - read(f"{prefix}rejected")


__all__ = [
    "ANCHOR",
    "COLUMNS",
    "PARTS",
    "REFERENCE",
    "SIDES",
    "BatchConstants",
    "LogProbs",
    "halves",
    "pair_logps",
    "require_reference",
    "stacked",
]

_SIDES_UNDER = [f"{prefix}{side}" for prefix in ("", "ref_", "anchor_") for side in SIDES]
_MISSING = {
    "ref_": "the objective compares with a reference, and the batch holds none: it needs "
    f"{' and '.join(REFERENCE)}, which gapo.data.with_reference_logps puts in the rows",
    "anchor_": "the objective looks at the anchor, and there is none: make it an Objective with needs_anchor=True, or "
    "hand LogProbs anchor_chosen and anchor_rejected",
}
