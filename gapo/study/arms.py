"""What is compared: the objectives of `gapo.objectives`, weighted ones among them, and controls; with each one's tries.

Every arm gets the same number of tries, in up to three rounds that each go on from the best so far: the learning rates
of the study's grid, with a first value of the arm's second setting; four other values of that setting; two learning
rates half a step of the grid away. An arm without a second setting tries learning rates in its place.

A weighted arm, such as "gapo+dpo", tries what "dpo" tries, at a radius that is not tried. So a difference between the
two is the weights', not that of a beta which one has chosen and the other not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from gapo.config import GAPOConfig
from gapo.objectives import OBJECTIVES, WEIGHTINGS, resolve

Settings = dict[str, Any]

Second = tuple[str, float, tuple[float, ...]]

# The second setting of each objective: its name, its first value (the published one), and the others that are tried.
_BETA_OF_MEANS = ("beta", 2.5, (0.1, 0.4, 1.0, 10.0))
_CLIP = ("clip", 10.0, (1.0, 3.0, 30.0, 100.0))
# The radius: the first makes a mean gap of about 0.2 nats per token on the small policies of the examples.
_RHO = ("rho", 1.0, (0.1, 0.25, 0.5, 2.0))
_SECOND: dict[str, Second] = {
    **dict.fromkeys(("gapo", "gapo_simpo", "gapo_capped"), _RHO),
    **dict.fromkeys(("simpo", "amapo", "alpha_dpo", "gapo_target", "margin_target"), _BETA_OF_MEANS),
    "rpo": ("beta", 0.1, (0.003, 0.01, 0.03, 0.3)),
    "ipo": ("tau", 0.1, (0.01, 0.03, 0.3, 1.0)),
    "sigmoid_norm": ("beta", 5.0, (0.1, 0.5, 2.0, 20.0)),
    "cal_dpo": ("beta", 0.001, (0.003, 0.01, 0.03, 0.1)),
    "sppo_hard": ("beta", 0.1, (0.01, 0.03, 0.3, 1.0)),
    **dict.fromkeys(("sigmoid_loss", "ramp", "unhinged"), _CLIP),
}
# What "-NAME" behind an objective changes: settings, and the radius that is held or tried there. The objective has an
# anchor, but for "sam", the update's gradient at the anchor, and its control along a random direction.
_AT_ANCHOR: dict[str, tuple[Settings, Second | None]] = {
    "sam-gaussian": ({"update": "anchor", "direction": "gaussian"}, ("rho", 2.0, (0.5, 1.0, 4.0, 8.0))),
    "sam": ({"update": "anchor"}, _RHO),
}
_VARIANTS: dict[str, tuple[Settings, Second | None]] = {
    **_AT_ANCHOR,
    "rho0": ({"rho": 0.0}, None),
    "gaussian": ({"direction": "gaussian"}, ("rho", 2.0, (0.5, 1.0, 4.0, 8.0))),
    "margin": ({"probe": "margin"}, _RHO),
    "l2": ({"adaptive": False}, ("rho", 0.1, (0.003, 0.01, 0.03, 0.3))),  # in units of weights, not of their shares
    "first-order": ({"anchor": "first_order"}, _RHO),
}
# Radii that are held: those that GAPO, and GAPO by a gaussian direction and in an L2 ball, chose in docs/study.md.
_HELD_RHO, _HELD_BY_VARIANT = 0.5, {"gaussian": 2.0, "sam-gaussian": 2.0, "l2": 0.03}


_OF_GAPO = {"loss_type", "label_smoothing"}  # fields of `GAPOConfig` that its own loss alone reads


@dataclass(frozen=True)
class Arm:
    """One line of the study.

    Attributes:
        name: as the configuration and the tables have it.
        objective: key of `gapo.objectives.OBJECTIVES`.
        fixed: settings that make it this arm.
        held: settings that its tries leave at a value.
        second: (name, first value, four others) of the setting that is tried beside the learning rate.
        control: whether it is a control, not a method of its own.
    """

    name: str
    objective: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)
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

    def scaled(self, factor: float) -> Arm:
        """The arm with its radii, tried or held, times `factor`."""

        def radius(rho: float) -> float:
            return float(f"{rho * factor:.3g}")

        held = {name: radius(value) if name == "rho" else value for name, value in self.held.items()}
        if self.second is None or self.second[0] != "rho":
            return replace(self, held=held)
        _, first, others = self.second
        return replace(self, held=held, second=("rho", radius(first), tuple(map(radius, others))))

    def given(self, settings: Settings) -> Settings:
        """The settings of a user, for all runs in place of tries.

        Raises:
            ValueError: the learning rate is missing, or a setting is not this arm's, or out of its range.
        """
        rate = settings.get("learning_rate")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
            raise ValueError(f"settings of {self.name!r} need a learning_rate > 0, got {rate!r}")
        for name, value in self.fixed.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{self.name!r} is that of {name}={value!r}; its settings have {settings[name]!r}")
        merged, objective = {**self.fixed, **self.held, **settings}, OBJECTIVES[self.objective]
        accepted = {"learning_rate", "sft_weight", *objective.defaults, *objective.step_settings.values()}
        takes_anchor = objective.needs_anchor or "update" in self.fixed
        accepted |= {f.name for f in fields(GAPOConfig)} - _OF_GAPO if takes_anchor else set()
        if unknown := [name for name in settings if name not in accepted]:
            raise ValueError(f"{self.name!r} has no setting {unknown[0]!r}; it takes {', '.join(sorted(accepted))}")
        try:
            resolve(self.objective, *self.divided(merged))
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings of {self.name!r}: {error}") from error
        return merged

    def divided(self, settings: Mapping[str, Any]) -> tuple[GAPOConfig, Settings]:
        """The settings of a run as the step takes them: those of `GAPOConfig`, and those of the objective.

        For "gapo+dpo", `beta` is DPO's own. The beta and gamma of its weights are `gap_beta` and `gap_gamma`.
        """
        objective = OBJECTIVES[self.objective]
        of_step = {name for name, field in objective.step_settings.items() if name == field}
        own = {name: settings[name] for name in settings if name in objective.defaults.keys() - of_step}
        rest = {name: value for name, value in settings.items() if name not in own and name != "learning_rate"}
        return GAPOConfig(**rest), own

    def _try(self, learning_rate: float, value: float | None) -> Settings:
        second = {} if self.second is None or value is None else {self.second[0]: value}
        return {**self.fixed, **self.held, **second, "learning_rate": learning_rate}


def _around(best: Settings, learning_rates: list[float], *distances: float) -> list[Settings]:
    """`best` with learning rates so many steps of the grid away."""
    grid = sorted(learning_rates)
    factor = grid[1] / grid[0] if len(grid) > 1 else 4.0
    return [
        {**best, "learning_rate": float(f"{best['learning_rate'] * factor**distance:.3g}")} for distance in distances
    ]


def parts_of(name: str) -> tuple[str, str, str]:
    """(weighting, objective, variant) of an arm's name, "" where there is none.

    >>> parts_of("gapo-drop+dpo-gaussian"), parts_of("simpo")
    (('gapo-drop', 'dpo', 'gaussian'), ('', 'simpo', ''))
    """
    variant = next((variant for variant in _VARIANTS if name.endswith(f"-{variant}")), "")
    weighting, _, base = name.removesuffix(f"-{variant}").rpartition("+")
    return weighting, base, variant


def arm_of(name: str) -> Arm:
    """The arm called so: an objective, one with weights before a "+", or a variant of it after a "-".

    Raises:
        ValueError: there is none.
    """
    weighting, base, variant = parts_of(name)
    objective_name = f"{weighting}+{base}" if weighting else base
    if objective_name not in OBJECTIVES:
        raise ValueError(
            f"arms has {name!r}; arms must be among {', '.join(OBJECTIVES)}, any of them behind one of "
            f"{', '.join(f'{weighting}+' for weighting in OBJECTIVES.weightings)}, and before one of "
            f"{', '.join(f'-{variant}' for variant in _AT_ANCHOR)}, or if it has an anchor "
            f"{', '.join(f'-{variant}' for variant in _VARIANTS if variant not in _AT_ANCHOR)}"
        )
    needs_anchor = OBJECTIVES[objective_name].needs_anchor or variant in _AT_ANCHOR
    if variant and not needs_anchor:
        raise ValueError(f"arms: {name!r} cannot be, for {objective_name!r} has no anchor; take {objective_name!r}")
    if variant == "rho0" and (same := _without_gaps(weighting, base)) != name:
        raise ValueError(f"arms: {name!r} is the same as {same!r}, for without a radius all gaps are 0; take {same!r}")
    fixed, radius = _VARIANTS[variant] if variant else ({}, _RHO)
    second, held = _second(base), {}
    if second is not None and second[0] == "rho" and not weighting:
        second = radius
    elif needs_anchor:
        held = {"rho": _HELD_BY_VARIANT.get(variant, _HELD_RHO)}
        second = None if second is not None and second[0] == "rho" else second
    control = variant not in ("", "sam") or weighting.startswith("margin") or base == "margin_target"
    return Arm(name, objective_name, fixed, held, second, control)


def _without_gaps(weighting: str, base: str) -> str:
    """The arm that an arm is where all gaps are 0."""
    base = "simpo" if base == "gapo_target" else base
    rest = "" if not weighting or WEIGHTINGS[weighting].needs_anchor else f"{weighting}+"
    return f"{rest}{base}-rho0" if OBJECTIVES[base].needs_anchor else f"{rest}{base}"


def _second(name: str) -> Second | None:
    """As the table has it; otherwise beta, where the objective has one: its default, and others as far as DPO's."""
    default = OBJECTIVES[name].defaults.get("beta")
    if name in _SECOND or default is None:
        return _SECOND.get(name)
    return ("beta", default, tuple(float(f"{factor * default:.3g}") for factor in (0.03, 0.1, 0.3, 3.0)))


class Arms(dict[str, Arm]):
    """The arms by name. It lists those that "all" stands for; any other of `arm_of` is made as it is asked for."""

    def __missing__(self, name: str) -> Arm:
        try:
            return arm_of(name)
        except ValueError as error:
            raise KeyError(name) from error


_WEIGHTED = (
    *("gapo+dpo", "gapo+simpo", "gapo+ropo", "gapo+sigmoid_loss", "gapo-drop+dpo", "gapo-drop+simpo"),
    *("gapo+dpo-gaussian", "margin+dpo", "margin+simpo", "margin-drop+dpo", "margin-drop+simpo"),
)
_CONTROLS = [f"gapo-{variant}" for variant in _VARIANTS if variant not in _AT_ANCHOR]
ARMS = Arms({name: arm_of(name) for name in (*OBJECTIVES, *_CONTROLS, *_WEIGHTED)})
