"""Other uses of the anchor gap than GAPO's, and their controls: candidates to compare, each with a pull that ends.

`gapo.objectives.weighted` has the weighting of any objective.
"""

from __future__ import annotations

from gapo._namespace import Array, stop_gradient
from gapo.objective import pair_losses
from gapo.objectives.batch_adaptive import label_likelihood
from gapo.objectives.formulas import objective
from gapo.objectives.registry import OBJECTIVES
from gapo.pairs import SIDES, LogProbs

_GAPO = "after Cho, Kim, Kim, arXiv 2602.04909"
_OF_STEP = {"beta": "beta", "gamma": "gamma"}


@objective(paper=_GAPO, needs_anchor=True, average=True, of_margins=True, step_settings=_OF_STEP)
def gapo_simpo(logps: LogProbs, *, beta: float = 2.5, gamma: float | Array = 0.25) -> Array:
    """SimPO's loss plus GAPO's: `-log sigmoid(beta * M - gamma) - log sigmoid(beta * Gamma - gamma)`.

    SimPO's pull ends as a pair is learned; GAPO's goes on. A trainer that takes the probe's gradient and does not zero
    it before the update trains on this sum.

    Args:
        beta: logistic temperature, > 0.
        gamma: target margin and target gap, times beta: a float, or (N,) one for each pair.

    Source: the sum of arXiv 2405.14734 and arXiv 2602.04909.
    """
    return sum(pair_losses(x, beta, gamma, "sigmoid", 0.0, logps.xp) for x in (logps.margins, logps.anchor_gaps))


@objective(paper=_GAPO, needs_anchor=True, average=True, of_margins=True, step_settings=_OF_STEP)
def gapo_capped(logps: LogProbs, *, beta: float = 2.5, gamma: float | Array = 0.25, cap: float = 0.0) -> Array:
    """GAPO's loss of the pairs that are not learned yet, those with `beta * M < gamma + cap`; 0 for the others.

    Args:
        beta: logistic temperature, > 0.
        gamma: target gap times beta: a float, or (N,) one for each pair.
        cap: how far beyond the target, in units of beta * M, a pair is still pulled.

    Source: arXiv 2602.04909, with a hinge's end.
    """
    xp = logps.xp
    losses = pair_losses(logps.anchor_gaps, beta, gamma, "sigmoid", 0.0, xp)
    return xp.where(beta * stop_gradient(logps.margins) < gamma + cap, losses, xp.zeros_like(losses))


@objective(paper=_GAPO, needs_anchor=True, average=True, of_margins=True, batch_statistics=True, step_settings=_OF_STEP)
def gapo_target(logps: LogProbs, *, beta: float = 2.5, gamma: float | Array = 0.25, strength: float = 0.5) -> Array:
    """SimPO with a target of each pair's own, lower for a larger gap.

    `-log sigmoid(beta * M - gamma_i)`, with the constant `gamma_i = gamma * (1 - strength * zscore(Gamma_i))`.

    Args:
        beta: logistic temperature, > 0.
        gamma: target margin times beta: a float, or (N,) one for each pair.
        strength: >= 0; at 0 it is SimPO.

    Source: arXiv 2405.14734, with the gap of arXiv 2602.04909.
    """
    targets = gamma * (1 - strength * logps.zscore(logps.anchor_gaps))
    return pair_losses(logps.margins, beta, targets, "sigmoid", 0.0, logps.xp)


@objective(paper=_GAPO, average=True, of_margins=True, batch_statistics=True, step_settings=_OF_STEP)
def margin_target(logps: LogProbs, *, beta: float = 2.5, gamma: float | Array = 0.25, strength: float = 0.5) -> Array:
    """The control of `gapo_target`: the margin's z-score stands in the gap's place, and no anchor is needed.

    `-log sigmoid(beta * M - gamma_i)`, with the constant `gamma_i = gamma * (1 + strength * zscore(M_i))`.

    Args:
        beta: logistic temperature, > 0.
        gamma: target margin times beta: a float, or (N,) one for each pair.
        strength: >= 0; at 0 it is SimPO.

    Source: a control of `gapo_target`; arXiv 2405.14734.
    """
    targets = gamma * (1 + strength * logps.zscore(logps.margins))
    return pair_losses(logps.margins, beta, targets, "sigmoid", 0.0, logps.xp)


@objective(
    paper="after Cao et al., arXiv 2509.24159",
    needs_reference=True,
    needs_anchor=True,
    batch_statistics=True,
    lengths=SIDES,
    evaluated_as=OBJECTIVES["re_po"],
)
def gapo_re_po(
    logps: LogProbs, *, beta: float = 0.1, reliability: float = 0.9, rate: float = 0.1, kappa: float = 1.0
) -> Array:
    """RE-PO with the anchor gap as a second witness against a label.

    As `re_po`, with `logit(eta) + beta * z - kappa * zscore(Gamma)` for the logit of w.

    Args:
        beta: as in `dpo`.
        reliability: as in `re_po`.
        rate: as in `re_po`.
        kappa: how much a gap of one deviation above the mean counts against the label, in nats, >= 0; at 0 it is RE-PO.

    Source: arXiv 2509.24159, with the gap of arXiv 2602.04909.
    """
    return label_likelihood(logps, beta, reliability, rate, doubt=kappa * logps.zscore(logps.anchor_gaps))
