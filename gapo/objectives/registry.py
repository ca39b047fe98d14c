"""One form for all objectives: a function of `LogProbs`, what it needs, and its settings.

The formulas register themselves by `gapo.objectives.formulas.objective`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gapo._namespace import Array, library
from gapo.config import named
from gapo.objective import (
    LOSS_TYPES,
    require_choice,
    require_number,
)
from gapo.pairs import LogProbs


class Registry(dict[str, "Objective"]):
    """The objectives by name. It lists those that are formulas of their own.

    A name with a "+", such as "gapo+dpo", is the objective behind the "+" with the weighting before it; it is made as
    it is asked for, and is not listed. The weightings are in `gapo.objectives.weighted`.
    """

    def __init__(self) -> None:
        self.weightings: dict[str, Callable[[Objective], Objective]] = {}
        self._weighted: dict[str, Objective] = {}

    def __missing__(self, name: str) -> Objective:
        weighting, _, base = name.partition("+") if isinstance(name, str) else ("", "", "")
        if weighting not in self.weightings or not dict.__contains__(self, base):
            raise KeyError(name)
        if name not in self._weighted:
            self._weighted[name] = self.weightings[weighting](self[base])
        return self._weighted[name]

    def __contains__(self, name: object) -> bool:
        if dict.__contains__(self, name):
            return True
        weighting, _, base = name.partition("+") if isinstance(name, str) else ("", "", "")
        return weighting in self.weightings and dict.__contains__(self, base)


OBJECTIVES = Registry()

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
    "reliability": ("in (0, 1)", lambda v: 0 < v < 1),
    "rate": ("in (0, 1]", lambda v: 0 < v <= 1),
    "keep": ("in (0, 1]", lambda v: 0 < v <= 1),
    "label_smoothing": ("in [0, 0.5)", lambda v: 0 <= v < 0.5),
    "gap_beta": (">= 0", lambda v: v >= 0),
    "gap_gamma": ("", lambda v: True),
    "gap_drop": ("in [0, 1)", lambda v: 0 <= v < 1),
    "strength": (">= 0", lambda v: v >= 0),
    "cap": ("", lambda v: True),
    "kappa": (">= 0", lambda v: v >= 0),
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
        weighs_by_gap: whether a pair counts `sigmoid(gamma - beta * gap)` times, as GAPO's pairs do.
        average: whether the public function of arrays takes length-normalised log-probabilities; otherwise sums.
        of_margins: whether the policy enters by its margins alone. One backward then serves probe and update with half
            the memory.
        batch_statistics: whether the loss of a pair depends on the other pairs of its batch.
        coupled: whether it does so with a gradient, so that the loss is one of the batch, not of each pair.
        step_settings: the settings that it takes from `GAPOConfig`, each with the name of the field there.
        evaluated_as: the objective whose loss an evaluation reports, which takes no anchor; None for itself, and for
            SimPO's, the probe's loss, if it needs an anchor.
        defaults: its settings by name, with their defaults.

    Raises:
        TypeError: `function` cannot be called, or has a setting without a default.
    """

    name: str
    function: Callable[..., Array]
    paper: str = ""
    needs_reference: bool = False
    needs_anchor: bool = False
    weighs_by_gap: bool = False
    average: bool = False
    of_margins: bool = False
    batch_statistics: bool = False
    coupled: bool = False
    step_settings: Mapping[str, str] = field(default_factory=dict)
    evaluated_as: Objective | None = None
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


# Names of TRL that other libraries and papers use for other losses too: an answer, but no second name.
_NAMES_IN_TRL = {
    "sigmoid": "TRL's 'sigmoid' is 'dpo' here; the symmetric sigmoid loss is 'sigmoid_loss'",
    "robust": "TRL's 'robust' is 'rdpo' here",
    "sft": "TRL's 'sft' is no objective on pairs: sft_weight adds it to any objective",
}


def find(name: str) -> Objective:
    """The objective called `name`, or ValueError that names them all.

    >>> find("gapo+dpo").needs_anchor, find("dpo").needs_anchor
    (True, False)
    """
    if isinstance(name, str) and name in _NAMES_IN_TRL:
        raise ValueError(f"there is no objective {name!r}: {_NAMES_IN_TRL[name]}")
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(map(repr, OBJECTIVES))}, got {name!r}. {prefixes()}")
    return OBJECTIVES[name]


def prefixes() -> str:
    """What may stand before a name, for a message."""
    return f"{', '.join(repr(f'{weighting}+') for weighting in OBJECTIVES.weightings)} may stand before a name"


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
