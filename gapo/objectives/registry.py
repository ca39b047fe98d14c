"""One form for all objectives: a function of `LogProbs`, what it needs, and its settings.

`Objective` is that form. `resolve` turns what a user names into a `Loss`, which is what the step takes. The formulas
register themselves by `gapo.objectives.formulas.objective`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gapo._namespace import Array, library
from gapo.config import GAPOConfig, named
from gapo.objective import (
    LOSS_TYPES,
    check_objective,
    require_choice,
    require_number,
)
from gapo.pairs import LogProbs

OBJECTIVES: dict[str, Objective] = {}

# What a setting accepts, as the message says it and as the check asks it: one meaning for one name, everywhere.
_ACCEPTED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("> 0", lambda v: v > 0),
    "beta_prime": ("> 0", lambda v: v > 0),
    "gamma": ("", lambda v: True),
    "tau": ("> 0", lambda v: v > 0),
    "alpha": ("> 0", lambda v: v > 0),
    "eta": (">= 0", lambda v: v >= 0),
    "clip": ("> 0", lambda v: v > 0),
    "epsilon": ("in (0, 0.5)", lambda v: 0 < v < 0.5),
    "label_smoothing": ("in [0, 0.5)", lambda v: 0 <= v < 0.5),
}


def check_settings(**settings: Any) -> None:
    """Raise ValueError, naming the setting, for one out of its range. `gamma` may also be an array (N,)."""
    for name, value in settings.items():
        if name == "loss_type":
            require_choice("loss_type", value, LOSS_TYPES)
        elif name in _ACCEPTED and not (name == "gamma" and getattr(value, "shape", ()) != ()):
            require_number(name, value, *_ACCEPTED[name])


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """One objective, and what it needs. A user's own is `Objective(name=..., function=...)`.

    Attributes:
        name: its key in `OBJECTIVES`, which is also the `loss` of `gapo train`.
        function: `function(logps, **settings)`, the loss of each pair (N,) from a `LogProbs`, differentiable in it. Its
            settings are keyword-only.
        paper: where it comes from.
        needs_reference: whether it compares with a reference policy: `LogProbs.ref_chosen`, `ref_rejected`, `z`.
        needs_anchor: whether it compares with an anchor, which the step makes: `LogProbs.anchor_gaps`.
        average: whether the public function of arrays takes length-normalised log-probabilities; otherwise sums.
        of_margins: whether the policy enters by its margins alone. One backward then serves probe and update with half
            the memory.
        batch_statistics: whether the loss of a pair depends on the other pairs of its batch.
        step_settings: the settings that it takes from `GAPOConfig`, and not from its caller.
        defaults: its settings by name, with their defaults.

    Raises:
        TypeError: `function` cannot be called, or has a setting without a default.
    """

    name: str
    function: Callable[..., Array]
    paper: str = ""
    needs_reference: bool = False
    needs_anchor: bool = False
    average: bool = False
    of_margins: bool = False
    batch_statistics: bool = False
    step_settings: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"objective {self.name!r}: function must be callable, got {named(self.function)}")
        options = [p for p in parameters_of(self.function) if p.kind is p.KEYWORD_ONLY]
        if bare := [p.name for p in options if p.default is p.empty]:
            raise TypeError(f"objective {self.name!r}: give the setting {bare[0]!r} a default")
        object.__setattr__(self, "defaults", {p.name: p.default for p in options})

    def settings(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All settings: those of the caller over the defaults.

        Raises:
            ValueError: one is not this objective's, or out of its range.
        """
        settings = dict(settings or {})
        for name in settings:
            if name not in self.defaults:
                accepted = ", ".join(f"{key} ({value!r})" for key, value in self.defaults.items()) or "none"
                raise ValueError(f"objective {self.name!r} has no setting {name!r}; it takes {accepted}")
        settings = {**self.defaults, **settings}
        check_settings(**settings)
        return settings

    def losses(self, logps: LogProbs, **settings: Any) -> Array:
        """Loss of each pair, (N,), float32 or wider; its mean over the batch is what training minimises.

        Differentiable in the policy's log-probabilities alone.

        Args:
            logps: the batch.
            settings: as `defaults`, whose values stand for those left out.

        Raises:
            TypeError, ValueError: the batch lacks what the objective needs, a setting is not accepted, or the function
                returns anything but (N,) losses.
        """
        settings = self.settings(settings)
        for prefix, needed in (("ref", self.needs_reference), ("anchor", self.needs_anchor)):
            if needed and not logps.has(prefix):
                raise ValueError(
                    f"objective {self.name!r} needs LogProbs({prefix}_chosen=..., {prefix}_rejected=...), "
                    f"got {prefix}_chosen=None"
                )
        losses = self.function(logps, **settings)
        if library(losses) is None or tuple(losses.shape) != logps.shape:
            came = f"shape {tuple(losses.shape)}" if hasattr(losses, "shape") else named(losses)
            raise ValueError(
                f"objective {self.name!r} must return the loss of each pair, an array of shape {logps.shape}, not "
                f"reduced; got {came}"
            )
        return losses


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # such as a builtin
        return []


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

        An objective with an anchor is evaluated by the probe's loss, SimPO's.
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


# Names of TRL that other libraries and papers use for other losses too: an answer, but no second name.
_NAMES_IN_TRL = {
    "sigmoid": "TRL's 'sigmoid' is 'dpo' here; the symmetric sigmoid loss is 'sigmoid_loss'",
    "robust": "TRL's 'robust' is 'rdpo' here",
    "sft": "TRL's 'sft' is no objective on pairs: sft_weight adds it to any objective",
}


def find(name: str) -> Objective:
    """The objective called `name`, or ValueError that names them all."""
    if isinstance(name, str) and name in _NAMES_IN_TRL:
        raise ValueError(f"there is no objective {name!r}: {_NAMES_IN_TRL[name]}")
    require_choice("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def as_objective(objective: str | Objective | Callable[..., Array]) -> Objective:
    """The objective that a caller means by a name, an `Objective`, or a function of `LogProbs`.

    A function says by its attributes `needs_anchor` and `needs_reference` that it needs them; without, it does not.

    Raises:
        TypeError: it is none of these.
        ValueError: no objective has this name.
    """
    if isinstance(objective, Objective):
        return objective
    if callable(objective) and not isinstance(objective, type):
        return Objective(
            name=getattr(objective, "__name__", type(objective).__name__),
            function=objective,
            needs_anchor=bool(getattr(objective, "needs_anchor", False)),
            needs_reference=bool(getattr(objective, "needs_reference", False)),
        )
    if isinstance(objective, type):
        raise TypeError(f"objective must be a name, an Objective or a function of LogProbs, got {named(objective)}")
    return find(objective)


def resolve(
    objective: str | Objective | Callable[..., Array] = "gapo",
    config: GAPOConfig | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Loss:
    """The loss of a step.

    Args:
        objective: a name of `OBJECTIVES`, an `Objective`, or a function of `LogProbs` that returns (N,) losses.
        config: settings of the step, from which "gapo" and "simpo" take theirs, and the SFT term; None for defaults.
        settings: of the other objectives; None for their defaults.

    Raises:
        TypeError, ValueError: the objective is none of these, or a setting is not accepted.
    """
    config = GAPOConfig() if config is None else config
    entry = as_objective(objective)
    if entry.step_settings and settings:
        raise ValueError(
            f"objective {entry.name!r} takes {' and '.join(entry.step_settings[:2])} from gapo.GAPOConfig, not from "
            f"settings of its own; got {dict(settings)}"
        )
    own = {name: getattr(config, name) for name in entry.step_settings} or entry.settings(settings)
    probe = resolve("simpo", replace(config, sft_weight=0.0)) if entry.needs_anchor else None
    return Loss(objective=entry, settings=own, sft_weight=config.sft_weight, probe=probe)
