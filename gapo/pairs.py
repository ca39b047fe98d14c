"""The batch of pairs: the names of its columns, its rows stacked for one forward, and its log-probabilities.

A batch is a mapping. Its columns are `{side}_{part}`, each (N, seq), and, where a reference was measured, `REFERENCE`,
each (N,). One forward takes both sides at once, the chosen rows above the rejected ones: row r belongs to pair r mod N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gapo._namespace import Array, Namespace, at_least_float32, like, namespace, stop_gradient
from gapo.logps import response_lengths, sequence_logps
from gapo.objective import check_batches

SIDES = ("chosen", "rejected")
PARTS = ("input_ids", "attention_mask", "labels")
COLUMNS = tuple(f"{side}_{part}" for side in SIDES for part in PARTS)
# TRL's names for reference log-probabilities: sums over the response's tokens, nats.
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_LENGTHS = ("chosen_lengths", "rejected_lengths")


def stacked(batch: Mapping[str, Array], *parts: str) -> list[Array]:
    """The named parts of both sides, each (2N, ...): chosen rows first.

    Args:
        batch: columns `{side}_{part}`, (N, ...) each, equally long on both sides.
        parts: among `PARTS`, or another part that the batch holds for both sides.
    """
    xp = namespace(**{parts[0]: batch[f"{SIDES[0]}_{parts[0]}"]})
    concat = getattr(xp, "concat", None) or xp.concatenate
    return [concat([batch[f"{side}_{part}"] for side in SIDES]) for part in parts]


def halves(rows: Array) -> tuple[Array, Array]:
    """(chosen, rejected), each (N, ...), of rows (2N, ...) that `stacked` made."""
    pairs = rows.shape[0] // 2
    return rows[:pairs], rows[pairs:]


def pair_logps(logits_fn: Callable[..., Array], batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """(chosen_logps, rejected_logps), each (N,), nats per token, from one call of a model on both sides.

    Args:
        logits_fn: `logits_fn(input_ids, attention_mask)`, (2N, seq) each, gives logits (2N, seq, vocab).
        batch: the columns `COLUMNS`.

    Raises:
        TypeError, ValueError: as `gapo.sequence_logps`.
    """
    ids, mask, labels = stacked(batch, *PARTS)
    return halves(sequence_logps(logits_fn(ids, mask), labels))


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchConstants:
    """What a batch tells of its pairs besides the policy's log-probabilities. Each field is (N,), or None if unknown.

    Attributes:
        chosen_lengths: number of tokens of each chosen response.
        rejected_lengths: the same of each rejected response.
        ref_chosen: log-probability of each chosen response under the reference, summed, nats.
        ref_rejected: the same of each rejected response.
    """

    chosen_lengths: Array | None = None
    rejected_lengths: Array | None = None
    ref_chosen: Array | None = None
    ref_rejected: Array | None = None

    @classmethod
    def of(cls, batch: Any) -> BatchConstants:
        """From the columns of a batch: labels or lengths, and `REFERENCE`; nothing of what is no mapping."""
        if not isinstance(batch, Mapping):
            return cls()
        fields = {name: batch[name] for name in _LENGTHS if name in batch}
        for side in SIDES:
            if f"{side}_labels" in batch and f"{side}_lengths" not in fields:
                fields[f"{side}_lengths"] = response_lengths(batch[f"{side}_labels"])
        reference = {name.removesuffix("_logps"): batch[name] for name in REFERENCE if name in batch}
        return cls(**fields, **reference)

    @property
    def complete(self) -> bool:
        """Whether lengths and reference are all known."""
        fields = (self.chosen_lengths, self.rejected_lengths, self.ref_chosen, self.ref_rejected)
        return all(x is not None for x in fields)


def require_reference(objective: str, columns: Iterable[str]) -> None:
    """Raise ValueError, saying what to do, unless `columns`, those of a batch, hold `REFERENCE`."""
    if not set(REFERENCE) <= set(columns):
        raise ValueError(
            f"objective {objective!r} needs {' and '.join(REFERENCE)} in each batch, summed log-probabilities under "
            "the reference, nats: put them in the rows with gapo.data.with_reference_logps (PyTorch: gapo.adapters.hf."
            f"with_reference_logps), and the batches have them; got {', '.join(columns) or 'neither'}"
        )


class LogProbs:
    """What a batch of N pairs tells an objective. Log-probabilities are SUMMED over the response's tokens, nats.

    It is made of sums, as here, or of length-normalised log-probabilities (`from_averages`); each is computed from the
    other, by the lengths, when it is asked for. Reference and anchor carry no gradient, ever. float16 and bfloat16 are
    widened to float32.

    Args:
        chosen: (N,) of each chosen response under the policy.
        rejected: (N,) of each rejected response under the policy.
        chosen_lengths: (N,) number of tokens of each chosen response, >= 1; integers or floats.
        rejected_lengths: (N,) the same of each rejected response.
        ref_chosen: (N,) of each chosen response under the reference; None where there is none.
        ref_rejected: (N,) of each rejected response under the reference.
        anchor_chosen: (N,) of each chosen response under the anchor; None where there is none.
        anchor_rejected: (N,) of each rejected response under the anchor.

    Every argument is an attribute of the same name. Attributes besides: `margins`, `z`, `anchor_gaps`,
    `anchor_margins`, and `xp`, the arrays' Array-API namespace.

    Raises:
        TypeError, ValueError: arrays of several libraries, not floating point, or of other shapes than (N,).
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
        sums = {
            "chosen": chosen,
            "rejected": rejected,
            "ref_chosen": ref_chosen,
            "ref_rejected": ref_rejected,
            "anchor_chosen": anchor_chosen,
            "anchor_rejected": anchor_rejected,
        }
        self._fill(sums, {}, {"chosen": chosen_lengths, "rejected": rejected_lengths})

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
        return cls._of(
            {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}, {"chosen": chosen, "rejected": rejected}, by_side
        )

    @classmethod
    def of_step(
        cls,
        outputs: tuple[Array, ...],
        constants: BatchConstants,
        anchor_outputs: tuple[Array, ...] | None = None,
        anchor_gaps: Array | None = None,
    ) -> LogProbs:
        """What a step knows.

        Args:
            outputs: of the margin function, (margins,) or (chosen_logps, rejected_logps), (N,), nats per token.
            constants: of the batch.
            anchor_outputs: the same at the anchor; None for a first-order anchor, which has no log-probabilities.
            anchor_gaps: (N,) as the step measured them; None without an anchor.
        """
        lengths = {"chosen": constants.chosen_lengths, "rejected": constants.rejected_lengths}
        sums = {"ref_chosen": constants.ref_chosen, "ref_rejected": constants.ref_rejected}
        averages = dict(zip(SIDES, outputs, strict=False)) if len(outputs) == 2 else {}
        if anchor_outputs is not None and len(anchor_outputs) == 2:
            averages |= {f"anchor_{side}": x for side, x in zip(SIDES, anchor_outputs, strict=True)}
        margins = outputs[0] if len(outputs) == 1 else None
        return cls._of(sums, averages, lengths, margins, anchor_gaps)

    @classmethod
    def _of(cls, *parts: Any) -> LogProbs:
        logps = cls.__new__(cls)
        logps._fill(*parts)
        return logps

    def _fill(
        self,
        sums: Mapping[str, Array | None],
        averages: Mapping[str, Array | None],
        lengths: Mapping[str, Array | None],
        margins: Array | None = None,
        anchor_gaps: Array | None = None,
    ) -> None:
        policy = {"margins": margins} if margins is not None else {**sums, **averages}
        first = next(x for name, x in policy.items() if x is not None and not name.startswith("ref_"))
        self._sums, self._averages = ({k: _like(x, first, k) for k, x in d.items()} for d in (sums, averages))
        self._lengths = {name: None if x is None else like(x, first) for name, x in lengths.items()}
        arrays = {name: x for name, x in ({**self._sums, **self._averages}).items() if x is not None}
        if margins is not None:
            arrays = {"margins": margins, **arrays}
        #: The Array-API namespace of the arrays.
        self.xp: Namespace = namespace(**arrays)
        check_batches(arrays, self.xp)
        for store in (self._sums, self._averages):
            for name, x in store.items():
                if x is not None:
                    x = at_least_float32(x, self.xp)
                    store[name] = stop_gradient(x) if name.startswith(("ref_", "anchor_")) else x
        self._margins = None if margins is None else at_least_float32(margins, self.xp)
        self._anchor_gaps = None if anchor_gaps is None else stop_gradient(anchor_gaps)

    def _sum(self, name: str) -> Array | None:
        x = self._sums.get(name)
        if x is None and (average := self._averages.get(name)) is not None:
            x = average * self._length(name, average)
        return self._known(name, x)

    def _average(self, name: str) -> Array | None:
        x = self._averages.get(name)
        if x is None and (total := self._sums.get(name)) is not None:
            x = total / self._length(name, total)
        return self._known(name, x)

    def _known(self, name: str, x: Array | None) -> Array | None:
        if x is None and name in SIDES:
            raise ValueError(
                "the objective needs log-probabilities of each response, and margin_fn returned margins alone: let it "
                "return (chosen_logps, rejected_logps)"
            )
        return x

    def _length(self, name: str, of: Array) -> Array:
        side = name.rpartition("_")[2]
        lengths = self._lengths.get(side)
        if lengths is None:
            raise ValueError(
                f"the objective needs the number of tokens of each {side} response, to sum log-probabilities or to "
                f"average them: let the batch hold {side}_labels (N, seq) or {side}_lengths (N,)"
            )
        return self.xp.astype(lengths, of.dtype)

    @property
    def chosen(self) -> Any:
        """(N,) summed, nats; the other log-probabilities likewise."""
        return self._sum("chosen")

    @property
    def rejected(self) -> Any:
        return self._sum("rejected")

    @property
    def chosen_lengths(self) -> Any:
        """(N,) numbers of tokens; None if unknown."""
        return self._lengths.get("chosen")

    @property
    def rejected_lengths(self) -> Any:
        return self._lengths.get("rejected")

    @property
    def ref_chosen(self) -> Any:
        return self._sum("ref_chosen")

    @property
    def ref_rejected(self) -> Any:
        return self._sum("ref_rejected")

    @property
    def anchor_chosen(self) -> Any:
        return self._sum("anchor_chosen")

    @property
    def anchor_rejected(self) -> Any:
        return self._sum("anchor_rejected")

    @property
    def margins(self) -> Any:
        """M (N,), the chosen minus the rejected response's length-normalised log-probability, nats per token."""
        return self._margins if self._margins is not None else self._difference(self._average, "")

    @property
    def z(self) -> Any:
        """z (N,), the policy's margin minus the reference's, on summed log-probabilities, nats.

        Raises ValueError without a reference.
        """
        return self._log_ratio(self._sum)

    @property
    def z_per_token(self) -> Any:
        """The same on length-normalised log-probabilities, nats per token."""
        return self._log_ratio(self._average)

    @property
    def anchor_margins(self) -> Any:
        """M at the anchor (N,), nats per token, without gradient. Raises ValueError without an anchor."""
        return stop_gradient(self.margins - self.anchor_gaps)

    @property
    def anchor_gaps(self) -> Any:
        """Anchor gaps (N,), M minus M at the anchor, nats per token; differentiable by way of M.

        Raises ValueError without an anchor.
        """
        if self._anchor_gaps is not None:
            # A first-order gap is far smaller than M: it keeps its digits, and M lends its derivative.
            return self._anchor_gaps + (self.margins - stop_gradient(self.margins))
        anchor_margins = self._difference(self._average, "anchor_")
        if anchor_margins is None:
            raise ValueError(
                "the objective looks at the anchor, and there is none: make it an Objective with needs_anchor=True, or "
                "hand LogProbs anchor_chosen and anchor_rejected"
            )
        return self.margins - anchor_margins

    def log_ratio_margins(self) -> Array | None:
        """`z`, or None without a reference."""
        return self.z if self.has("ref") else None

    @property
    def chosen_per_token(self) -> Any:
        """(N,) length-normalised log-probability of each chosen response, nats per token."""
        return self._average("chosen")

    @property
    def margins_alone(self) -> bool:
        """Whether nothing but margins is known of the policy."""
        return self._margins is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N,)."""
        arrays = (self._margins, *self._averages.values(), *self._sums.values())
        return next(tuple(x.shape) for x in arrays if x is not None)

    def has(self, kind: str) -> bool:
        """Whether log-probabilities of both sides under the "ref" or the "anchor" are known, or the anchor's gaps."""
        if kind == "anchor" and self._anchor_gaps is not None:
            return True
        return all(
            self._sums.get(f"{kind}_{s}") is not None or self._averages.get(f"{kind}_{s}") is not None for s in SIDES
        )

    def per_token(self) -> LogProbs:
        """The same with every log-probability divided by its response's length: nats per token."""
        names = {*self._sums, *self._averages}
        return self._of({name: self._average(name) for name in names}, {}, self._lengths, None, self._anchor_gaps)

    def _difference(self, read: Callable[[str], Array | None], prefix: str) -> Any:
        if prefix and not self.has(prefix.rstrip("_")):
            return None
        chosen, rejected = (read(prefix + side) for side in SIDES)
        return chosen - rejected  # type: ignore[operator]

    def _log_ratio(self, read: Callable[[str], Array | None]) -> Any:
        reference = self._difference(read, "ref_")
        if reference is None:
            raise ValueError(
                "the objective compares with a reference, and the batch holds none: it needs "
                f"{' and '.join(REFERENCE)}, which gapo.data.with_reference_logps puts in the rows"
            )
        return self._difference(read, "") - reference


def _like(x: Array | None, first: Array, name: str) -> Array | None:
    """A reference or an anchor of a batch in the policy's library and on its device; the policy itself as it is."""
    return x if x is None or name in SIDES else like(x, first)
