"""Objectives of the policy alone, and GAPO's, on length-normalised log-probabilities."""

from __future__ import annotations

from gapo._namespace import Array
from gapo.objective import pair_losses
from gapo.objectives.formulas import objective
from gapo.pairs import LogProbs


@objective(
    paper="Cho, Kim, Kim, arXiv 2602.04909",
    needs_anchor=True,
    weighs_by_gap=True,
    average=True,
    of_margins=True,
    step_settings={name: name for name in ("beta", "gamma", "loss_type", "label_smoothing")},
)
def gapo(
    logps: LogProbs,
    *,
    beta: float = 2.5,
    gamma: float | Array = 0.25,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Array:
    """GAPO: `-log sigmoid(beta * Gamma - gamma)`, with Gamma the anchor gap. The same as `gapo.loss`.

    Args:
        beta: logistic temperature, > 0.
        gamma: target gap times beta: a float, or (N,) one for each pair.
        loss_type: "sigmoid" or "hinge".
        label_smoothing: in [0, 0.5).

    Source: Cho, Kim, Kim, arXiv 2602.04909; method document, step 5.
    """
    return pair_losses(logps.anchor_gaps, beta, gamma, loss_type, label_smoothing, logps.xp)


@objective(
    paper="Meng, Xia, Chen, arXiv 2405.14734",
    average=True,
    of_margins=True,
    step_settings={"beta": "beta", "gamma": "gamma"},
)
def simpo(logps: LogProbs, *, beta: float = 2.5, gamma: float | Array = 0.25) -> Array:
    """SimPO: `-log sigmoid(beta * M - gamma)`, with M the margin of length-normalised log-probabilities.

    Args:
        beta: logistic temperature, > 0.
        gamma: target margin times beta (SimPO's code takes `gamma / beta`): a float, or (N,) one for each pair.

    Source: Meng, Xia, Chen, arXiv 2405.14734; the defaults are its recipe for Mistral-7B-Instruct. It is also the probe
    loss of GAPO (method document, step 2).

    >>> import numpy as np
    >>> round(float(simpo(np.array([-1.0]), np.array([-1.1]))), 4)
    0.6931
    """
    return pair_losses(logps.margins, beta, gamma, "sigmoid", 0.0, logps.xp)


@objective(paper="Xiao et al., arXiv 2502.00883", average=True)
def simper(logps: LogProbs) -> Array:
    """SimPER: `-exp(logp(chosen)) + exp(logp(rejected))`, inverse perplexities, on length-normalised log-probabilities.

    It has no settings. A response that is unlikely per token has next to no gradient.

    Source: Xiao et al., arXiv 2502.00883.

    >>> import numpy as np
    >>> round(float(simper(np.array([-1.0]), np.array([-2.0]))), 4)
    -0.2325
    """
    return logps.xp.exp(logps.rejected_per_token) - logps.xp.exp(logps.chosen_per_token)
