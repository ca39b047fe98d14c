"""Everything that a study has measured, as its report takes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gapo.study.arms import Settings
from gapo.study.cells import Cell
from gapo.study.study_config import StudyConfig


@dataclass(frozen=True)
class Study:
    """Everything that was measured, as the report takes it.

    Attributes:
        config: the study's settings.
        chosen: settings of each arm.
        tries: every try of them.
        records: the cells of the grid, curves and valuation with their records.
        parts: the same cells by part: "grid", "rho", "anchor", "valuation", and "noisy choice", the grid with settings
            that were chosen on noisy validation labels.
        left_out: (mode, rate) that the pairs do not allow, with the reason.
        facts: policy, data, versions, times.
        chosen_by: settings of each arm by the validation labels, "clean" or "noisy", that they were chosen on.
    """

    config: StudyConfig
    chosen: dict[str, Settings]
    tries: list[dict[str, Any]]
    records: dict[Cell, dict[str, Any]]
    parts: dict[str, list[Cell]]
    left_out: dict[str, str]
    facts: dict[str, Any]
    chosen_by: dict[str, dict[str, Settings]] = field(default_factory=dict)
