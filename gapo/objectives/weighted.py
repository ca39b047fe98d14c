"""Objectives whose pairs are weighted: "gapo+NAME", and its controls, for every objective NAME.

`L = mean_i sg(v_i) * l_i`, with l_i the objective's loss and v_i of mean 1 over the batch, all ranks. The weight keeps
what the anchor gap finds; the objective keeps its own pull, which may end once a pair is learned, as GAPO's never does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from gapo._namespace import Array, stop_gradient
from gapo.objective import log_sigmoid
from gapo.objectives.registry import OBJECTIVES, Objective, parameters_of
from gapo.pairs import LogProbs

_LEFT_OUT = -1e4  # a log-weight: exp of it is 0 in every precision


def by_sigmoid(witness: Array, logps: LogProbs, *, gap_beta: float = 2.5, gap_gamma: float = 0.25) -> Array:
    """log sigmoid(gap_gamma - gap_beta * witness), (N,): GAPO's weight of a gap, over its beta."""
    return log_sigmoid(gap_gamma - gap_beta * witness, logps.xp)


def by_rank(witness: Array, logps: LogProbs, *, gap_drop: float = 0.2) -> Array:
    """0 for the pairs that stay, (N,); the share `gap_drop` of this rank's pairs with the largest witness goes."""
    xp, n = logps.xp, witness.shape[0]
    last = xp.sort(witness)[n - 1 - int(gap_drop * n + 1e-9)]
    return xp.where(witness <= last, xp.zeros_like(witness), _LEFT_OUT * xp.ones_like(witness))


def gap(logps: LogProbs) -> Array:
    """The anchor gap (N,), nats per token."""
    return stop_gradient(logps.anchor_gaps)


def low_margin(logps: LogProbs) -> Array:
    """Minus the margin's z-score in the batch, (N,): the control that needs no anchor."""
    return -logps.zscore(logps.margins)


class Weighting(NamedTuple):
    """What stands before the "+" of a name.

    Attributes:
        witness: of a `LogProbs`, (N,): the larger, the less a pair is to count.
        rule: of (witness, logps), with settings: the logarithms of the weights, (N,), up to a constant.
        needs_anchor: whether `witness` looks at the anchor.
        step_settings: settings of `rule` taken from `GAPOConfig`, each with the name of the field there.
    """

    witness: Callable[[LogProbs], Array]
    rule: Callable[..., Array]
    needs_anchor: bool
    step_settings: dict[str, str]


_AS_GAPO = {"gap_beta": "beta", "gap_gamma": "gamma"}
WEIGHTINGS = {
    "gapo": Weighting(gap, by_sigmoid, True, _AS_GAPO),
    "gapo-drop": Weighting(gap, by_rank, True, {}),
    "margin": Weighting(low_margin, by_sigmoid, False, _AS_GAPO),
    "margin-drop": Weighting(low_margin, by_rank, False, {}),
}


def weighted(name: str, weighting: Weighting, base: Objective) -> Objective:
    """`base` with weights: the objective "name+base".

    Its settings are those of `base` and of the weighting's rule.
    """
    own = [p for p in parameters_of(weighting.rule) if p.kind is p.KEYWORD_ONLY]

    def function(logps: LogProbs, **settings: Any) -> Array:
        of_rule = {p.name: settings.pop(p.name) for p in own if p.name in settings}
        weights = logps.weights_of_mean_one(weighting.rule(weighting.witness(logps), logps, **of_rule))
        if base.coupled:  # one loss of the whole batch: each pair's pull on it is weighted
            return base.losses(logps.pulled_by(weights), **settings)
        return weights * base.losses(logps, **settings)

    signature = inspect.signature(base.function)
    settings = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    first = inspect.Parameter("logps", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    function.__signature__ = signature.replace(parameters=[first, *settings, *own])  # type: ignore[attr-defined]
    return Objective(
        name=f"{name}+{base.name}",
        function=function,
        paper=base.paper,
        needs_reference=base.needs_reference,
        needs_anchor=base.needs_anchor or weighting.needs_anchor,
        weighs_by_gap=weighting.needs_anchor and weighting.rule is by_sigmoid,
        average=base.average,
        of_margins=base.of_margins,
        batch_statistics=True,
        coupled=base.coupled,
        step_settings={**base.step_settings, **weighting.step_settings},
        evaluated_as=base.evaluated_as if base.needs_anchor else base,
    )


for _name, _weighting in WEIGHTINGS.items():
    OBJECTIVES.weightings[_name] = partial(weighted, _name, _weighting)

__all__ = ["WEIGHTINGS", "Weighting", "weighted"]
