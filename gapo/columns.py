"""The names of a batch's columns, its rows stacked, and what else the columns tell of its pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gapo._namespace import Array, library, namespace
from gapo.logps import response_lengths

SIDES = ("chosen", "rejected")
PARTS = ("input_ids", "attention_mask", "labels")
COLUMNS = tuple(f"{side}_{part}" for side in SIDES for part in PARTS)
# TRL's names for reference log-probabilities: sums over the response's tokens, nats.
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
# The LD-DPO alpha that they were measured with, where it is not 1: (N,), of each pair.
REFERENCE_ALPHA = "ref_ld_alpha"
# Log-probabilities at an anchor of the caller's own, in nats per token, as `gapo.loss` takes them.
ANCHOR = ("anchor_chosen_logps", "anchor_rejected_logps")
LENGTHS = ("chosen_lengths", "rejected_lengths")


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


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchConstants:
    """What a batch tells of its pairs besides the policy's log-probabilities. Each field is (N,), or None if unknown.

    Attributes:
        chosen_lengths: number of tokens of each chosen response.
        rejected_lengths: the same of each rejected response.
        ref_chosen: log-probability of each chosen response under the reference, summed, nats.
        ref_rejected: the same of each rejected response.
        anchor_chosen: log-probability of each chosen response at an anchor of the caller's own, nats per token.
        anchor_rejected: the same of each rejected response.
        pair_weights: factor of each pair's loss, a constant.
    """

    chosen_lengths: Array | None = None
    rejected_lengths: Array | None = None
    ref_chosen: Array | None = None
    ref_rejected: Array | None = None
    anchor_chosen: Array | None = None
    anchor_rejected: Array | None = None
    pair_weights: Array | None = None

    @classmethod
    def of(cls, batch: Any) -> BatchConstants:
        """From the columns of a batch that are arrays: labels or lengths, `REFERENCE`, and `ANCHOR`."""
        columns = batch if isinstance(batch, Mapping) else {}
        names = (*LENGTHS, *REFERENCE, *ANCHOR)
        arrays = {name: columns[name] for name in names if library(columns.get(name)) is not None}
        for side, name in zip(SIDES, LENGTHS, strict=True):
            labels: Any = columns.get(f"{side}_labels")
            if name not in arrays and library(labels) is not None and len(labels.shape) == 2:
                arrays[name] = response_lengths(labels)
        if len(present := [name for name in ANCHOR if name in arrays]) == 1:
            raise ValueError(f"a batch with an anchor of its own holds {' and '.join(ANCHOR)}; got {present[0]} alone")
        return cls(**{name.removesuffix("_logps"): x for name, x in arrays.items()})

    @property
    def has_anchor(self) -> bool:
        """Whether the batch brings its anchor, so that the step makes none."""
        return self.anchor_chosen is not None and self.anchor_rejected is not None


def require_reference(objective: str, columns: Iterable[str], function: str = "gapo.data.with_reference_logps") -> None:
    """Raise ValueError unless `columns`, those of a batch, hold `REFERENCE`; the error names the `function` to use."""
    if not set(REFERENCE) <= set(columns):
        raise ValueError(
            f"objective {objective!r} needs {' and '.join(REFERENCE)} in each batch: summed log-probabilities under "
            f"the reference, nats. {function} adds them to the rows, and batches of such rows have them; "
            f"got {', '.join(columns) or 'neither'}"
        )
