"""What is compared: every objective of `gapo.objectives`, and GAPO with its controls; each with the tries it gets.

Every arm gets the same number of tries: first the learning rates of the study's grid, with the published value of its
second setting; then two other values of that setting at the best learning rate. An arm without one tries two more
learning rates instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gapo.objectives import OBJECTIVES

Settings = dict[str, Any]

# The second setting of each objective: its name, its first value, and the two others that are tried.
_SECOND: dict[str, tuple[str, float, tuple[float, float]]] = {
    "simpo": ("beta", 2.5, (1.0, 10.0)),
    "amapo": ("beta", 2.5, (1.0, 10.0)),
    "dpo": ("beta", 0.1, (0.03, 0.3)),
    "cdpo": ("beta", 0.1, (0.03, 0.3)),
    "rdpo": ("beta", 0.1, (0.03, 0.3)),
    "dr_dpo": ("beta", 0.1, (0.03, 0.3)),
    "ipo": ("tau", 0.1, (0.3, 1.0)),
    "ropo": ("beta", 0.1, (0.03, 0.3)),
    "hypo": ("beta", 0.1, (0.03, 0.3)),
    "rpo": ("beta", 0.1, (0.03, 0.3)),
    "sigmoid_loss": ("clip", 10.0, (3.0, 30.0)),
    "ramp": ("clip", 10.0, (3.0, 30.0)),
    "unhinged": ("clip", 10.0, (3.0, 30.0)),
}
_RHO = ("rho", 2.0, (0.5, 4.0))
_RHO_L2 = ("rho", 0.1, (0.03, 0.3))  # in units of weights, not of their shares


@dataclass(frozen=True)
class Arm:
    """One line of the study.

    Attributes:
        name: as the configuration and the tables have it.
        objective: key of `gapo.objectives.OBJECTIVES`.
        fixed: settings that make it this arm: of the objective, or for "gapo" of `gapo.GAPOConfig`.
        second: (name, first value, two others) of the setting that is tried beside the learning rate.
        control: whether it is a control of GAPO, not a method of its own.
    """

    name: str
    objective: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    second: tuple[str, float, tuple[float, float]] | None = None
    control: bool = False

    def first_tries(self, learning_rates: list[float]) -> list[Settings]:
        """One try for each learning rate of the grid."""
        return [self._try(rate, self.second[1] if self.second else None) for rate in learning_rates]

    def further_tries(self, best: Settings, learning_rates: list[float]) -> list[Settings]:
        """Two tries around the best of the first ones."""
        if self.second is not None:
            return [self._try(best["learning_rate"], value) for value in self.second[2]]
        grid = sorted(learning_rates)
        factor = (grid[1] / grid[0]) ** 0.5 if len(grid) > 1 else 2.0
        return [self._try(float(f"{best['learning_rate'] * f:.3g}"), None) for f in (1 / factor, factor)]

    def _try(self, learning_rate: float, value: float | None) -> Settings:
        second = {} if self.second is None or value is None else {self.second[0]: value}
        return {**self.fixed, **second, "learning_rate": learning_rate}


def _gapo(name: str, second: Any, **fixed: Any) -> Arm:
    return Arm(name, "gapo", fixed, second, control=name != "gapo")


_LIST = (
    _gapo("gapo", _RHO),
    *(Arm(name, name, second=_SECOND.get(name)) for name in OBJECTIVES if name != "gapo"),
    _gapo("gapo-rho0", None, rho=0.0),
    _gapo("gapo-gaussian", _RHO, direction="gaussian"),
    _gapo("gapo-margin", _RHO, probe="margin"),
    _gapo("gapo-l2", _RHO_L2, adaptive=False),
    _gapo("gapo-first-order", _RHO, anchor="first_order"),
)
ARMS = {arm.name: arm for arm in _LIST}
