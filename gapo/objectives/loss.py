"""`Loss`, what a step minimises: an objective with its settings. `resolve` makes it of what a user names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gapo._namespace import Array
from gapo.config import GAPOConfig
from gapo.objective import check_objective
from gapo.objectives.registry import OBJECTIVES, Objective, as_objective, find
from gapo.pairs import LogProbs

logger = logging.getLogger(__name__)

_LEAST_BETA = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """What a step minimises: an objective with its settings, and the SFT term.

    Attributes:
        objective: the objective.
        settings: all of its settings.
        sft_weight: weight of the SFT term, the chosen response's negative log-probability per token.
        probe: the loss that stands for it where there is no anchor, in evaluation; None for itself.
    """

    objective: Objective
    settings: Mapping[str, Any]
    sft_weight: float = 0.0
    probe: Loss | None = None

    @property
    def name(self) -> str:
        return self.objective.name

    @property
    def needs_anchor(self) -> bool:
        return self.objective.needs_anchor

    @property
    def needs_reference(self) -> bool:
        return self.objective.needs_reference

    @property
    def by_side(self) -> bool:
        """Whether the two sides of a pair may be pulled by other amounts than plus and minus the same."""
        return bool(self.sft_weight) or not self.objective.of_margins

    @property
    def evaluated(self) -> Loss:
        """The loss that an evaluation reports: without an anchor and without the SFT term.

        An objective with an anchor is evaluated by what it says, or by the probe's loss, SimPO's.
        """
        return self.probe if self.probe is not None else replace(self, sft_weight=0.0)

    def over(self, gamma: Any) -> Loss:
        """The same with another `gamma`, a float or (N,); None leaves it.

        Raises:
            ValueError: the objective has no such setting.
        """
        if gamma is None:
            return self
        if "gamma" not in self.settings:
            holders = " and ".join(repr(name) for name, entry in OBJECTIVES.items() if "gamma" in entry.defaults)
            takes = ", ".join(self.settings) or "no settings"
            raise ValueError(f"gamma is of objectives {holders}; {self.name!r} takes {takes}")
        return replace(self, settings={**self.settings, "gamma": gamma})

    def losses(self, logps: LogProbs) -> Array:
        """Loss of each pair (N,), the SFT term included."""
        gamma = self.settings.get("gamma")
        if getattr(gamma, "shape", ()) != ():
            check_objective(1.0, gamma, "sigmoid", 0.0, n=logps.shape[0])
        losses = self.objective.losses(logps, **self.settings)
        if not self.sft_weight:
            return losses
        if logps.margins_alone:
            raise ValueError(
                f"sft_weight={self.sft_weight} needs the chosen log-probs: let margin_fn return (chosen_logps, "
                "rejected_logps)"
            )
        return losses - self.sft_weight * logps.chosen_per_token


def resolve(
    objective: str | Objective | Callable[..., Array] = "gapo",
    config: GAPOConfig | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Loss:
    """The loss of a step.

    Args:
        objective: a name of `OBJECTIVES`, an `Objective`, or a function of `LogProbs` that returns (N,) losses.
        config: settings of the step, from which "gapo" and "simpo" take theirs, "gapo+NAME" its weights' beta and
            gamma, and all the SFT term; None for defaults.
        settings: of the objective; None for its defaults.

    Raises:
        TypeError, ValueError: the objective is none of these, or a setting is not accepted.
    """
    config = GAPOConfig() if config is None else config
    entry, overrides = as_objective(objective), dict(settings or {})
    of_step = [name for name, field in entry.step_settings.items() if name == field]
    if any(name in of_step for name in overrides):
        raise ValueError(
            f"objective {entry.name!r} takes {' and '.join(of_step[:2])} from gapo.GAPOConfig, not from settings of "
            f"its own; got {overrides}"
        )
    own = entry.settings({name: getattr(config, field) for name, field in entry.step_settings.items()} | overrides)
    probe = None
    if entry.evaluated_as is not None:
        stand_in = entry.evaluated_as
        probe = Loss(objective=stand_in, settings={name: own[name] for name in stand_in.defaults})
    elif entry.needs_anchor:
        probe = resolve(find("simpo"), replace(config, sft_weight=0.0))
    return Loss(objective=entry, settings=own, sft_weight=config.sft_weight, probe=probe)


def warn_of_scale(loss: Loss) -> None:
    """Log a warning for a `beta` that is DPO's, of sums, where the objective applies it to nats per token."""
    beta = loss.settings.get("beta")
    if loss.objective.step_settings.get("beta") == "beta" and beta is not None and beta < _LEAST_BETA:
        logger.warning(
            "beta=%g is of DPO's scale, for sums of log-probabilities; %s applies it to means per token, where 2 to 10 "
            "is usual and such a small one hardly tells pairs apart",
            beta,
            loss.name,
        )


def require_own_settings(loss: Loss, config: GAPOConfig, settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where `config`, one flat set of fields, holds a setting that the objective takes elsewhere.

    A `beta` of the step beside DPO's own `beta` would be ignored.

    Args:
        loss: what the settings resolved to.
        config: the step's settings.
        settings: those of the objective that its user wrote.
        where: how the user writes one of them, with {name} and {value} to fill in.
    """
    for name, value in loss.settings.items():
        elsewhere = getattr(config, name, None)
        if name in settings or name in loss.objective.step_settings or elsewhere == getattr(GAPOConfig(), name, None):
            continue
        readers = [setting for setting, field in loss.objective.step_settings.items() if field == name]
        raise ValueError(
            f"{name}={elsewhere!r} is a setting of {', '.join(readers) or 'gapo and simpo'}, and objective "
            f"{loss.name!r} has a {name} of its own: give {where.format(name=name, value=value)}"
        )
