"""A cell of the grid: what decides one training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One training run, or one valuation, of the study.

    Attributes:
        arm: name of the arm.
        settings: (name, value), sorted: the learning rate and the objective's own.
        mode: flip mode.
        rate: share of flipped labels.
        seed: of pairs, order and flips.
        judged_on: "test" or "validation".
        anchor_pairs: pairs that share an anchor, 0 for the whole batch.
        valuation: the SimPO settings of a valuation, whose gaps come from this cell's own run; () for a plain run.
    """

    arm: str
    settings: tuple[tuple[str, Any], ...]
    mode: str
    rate: float
    seed: int
    judged_on: str = "test"
    anchor_pairs: int = 0
    valuation: tuple[tuple[str, Any], ...] = ()


def settings_key(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Settings as a cell holds them."""
    return tuple(sorted(settings.items()))
