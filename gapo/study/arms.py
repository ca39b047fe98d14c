"""What is compared: every objective of `gapo.objectives`, and GAPO with its controls; each with the tries it gets.

Every arm gets the same number of tries, in three rounds that each go on from the best so far: the learning rates of the
study's grid, with a first value of the arm's second setting; four other values of that setting; two learning rates half
a step of the grid away. An arm without a second setting tries learning rates in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gapo.objectives import OBJECTIVES

Settings = dict[str, Any]

Second = tuple[str, float, tuple[float, ...]]

# The second setting of each objective: its name, its first value (the published one), and the others that are tried.
_BETA = ("beta", 0.1, (0.003, 0.01, 0.03, 0.3))
_BETA_OF_MEANS = ("beta", 2.5, (0.1, 0.4, 1.0, 10.0))
_CLIP = ("clip", 10.0, (1.0, 3.0, 30.0, 100.0))
_SECOND: dict[str, Second] = {
    "simpo": _BETA_OF_MEANS,
    "amapo": _BETA_OF_MEANS,
    "alpha_dpo": _BETA_OF_MEANS,
    "ipo": ("tau", 0.1, (0.01, 0.03, 0.3, 1.0)),
    "sigmoid_norm": ("beta", 5.0, (0.1, 0.5, 2.0, 20.0)),
    "cal_dpo": ("beta", 0.001, (0.003, 0.01, 0.03, 0.1)),
    "sppo_hard": ("beta", 0.1, (0.01, 0.03, 0.3, 1.0)),
    **dict.fromkeys(("dpo", "cdpo", "rdpo", "dr_dpo", "ropo", "hypo", "rpo", "r_dpo", "re_po", "beta_dpo"), _BETA),
    **dict.fromkeys(("hinge", "discopop", "exo_pair", "nca_pair", "bco_pair", "apo_zero", "apo_down"), _BETA),
    **dict.fromkeys(("aot", "aot_unpaired"), _BETA),
    **dict.fromkeys(("sigmoid_loss", "ramp", "unhinged"), _CLIP),
}
# The radius: the first makes a mean gap of about 0.2 nats per token on the small policies of the examples.
_RHO = ("rho", 1.0, (0.1, 0.25, 0.5, 2.0))
_RHO_GAUSSIAN = ("rho", 2.0, (0.5, 1.0, 4.0, 8.0))
_RHO_L2 = ("rho", 0.1, (0.003, 0.01, 0.03, 0.3))  # in units of weights, not of their shares


@dataclass(frozen=True)
class Arm:
    """One line of the study.

    Attributes:
        name: as the configuration and the tables have it.
        objective: key of `gapo.objectives.OBJECTIVES`.
        fixed: settings that make it this arm: of the objective, or for "gapo" of `gapo.GAPOConfig`.
        second: (name, first value, four others) of the setting that is tried beside the learning rate.
        control: whether it is a control of GAPO, not a method of its own.
    """

    name: str
    objective: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    second: Second | None = None
    control: bool = False

    def first_tries(self, learning_rates: list[float]) -> list[Settings]:
        """One try for each learning rate of the grid."""
        return [self._try(rate, self.second[1] if self.second else None) for rate in learning_rates]

    def second_tries(self, best: Settings, learning_rates: list[float]) -> list[Settings]:
        """Other values of the second setting at the best learning rate, or as many other learning rates."""
        if self.second is None:
            return _around(best, learning_rates, -1.5, -0.5, 0.5, 1.5)
        return [self._try(best["learning_rate"], value) for value in self.second[2]]

    def last_tries(self, best: Settings, learning_rates: list[float]) -> list[Settings]:
        """Two learning rates around the best of all."""
        distance = 0.25 if self.second is None else 0.5
        return _around(best, learning_rates, -distance, distance)

    def _try(self, learning_rate: float, value: float | None) -> Settings:
        second = {} if self.second is None or value is None else {self.second[0]: value}
        return {**self.fixed, **second, "learning_rate": learning_rate}


def _around(best: Settings, learning_rates: list[float], *distances: float) -> list[Settings]:
    """`best` with learning rates so many steps of the grid away."""
    grid = sorted(learning_rates)
    factor = grid[1] / grid[0] if len(grid) > 1 else 4.0
    return [
        {**best, "learning_rate": float(f"{best['learning_rate'] * factor**distance:.3g}")} for distance in distances
    ]


def _gapo(name: str, second: Second | None, **fixed: Any) -> Arm:
    return Arm(name, "gapo", fixed, second, control=name != "gapo")


_LIST = (
    _gapo("gapo", _RHO),
    *(Arm(name, name, second=_SECOND.get(name)) for name in OBJECTIVES if name != "gapo"),
    _gapo("gapo-rho0", None, rho=0.0),
    _gapo("gapo-gaussian", _RHO_GAUSSIAN, direction="gaussian"),
    _gapo("gapo-margin", _RHO, probe="margin"),
    _gapo("gapo-l2", _RHO_L2, adaptive=False),
    _gapo("gapo-first-order", _RHO, anchor="first_order"),
)
ARMS = {arm.name: arm for arm in _LIST}
