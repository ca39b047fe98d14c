"""Objectives that compare the policy with a reference policy, most often the one that training started from.

z = (logp(chosen) - logp(rejected)) - (ref_logp(chosen) - ref_logp(rejected)), on log-probabilities summed over the
response (nats) unless a function says otherwise. Reference log-probabilities carry no gradient, ever.
"""

from __future__ import annotations

from gapo._namespace import Array
from gapo.objective import logistic
from gapo.objectives.formulas import objective
from gapo.pairs import LogProbs


@objective(paper="Rafailov et al., arXiv 2305.18290", needs_reference=True)
def dpo(logps: LogProbs, *, beta: float = 0.1) -> Array:
    """DPO: `-log sigmoid(beta * z)`.

    Args:
        beta: strength of the pull towards the reference, > 0.

    Source: Rafailov et al., arXiv 2305.18290; beta 0.1 is its default for dialogue.

    >>> import numpy as np
    >>> round(float(dpo(np.array([-10.0]), np.array([-12.0]), np.array([-11.0]), np.array([-11.0]))), 4)
    0.5981
    """
    return logistic(beta * logps.z, logps.xp)


@objective(paper="Azar et al., arXiv 2310.12036", needs_reference=True, average=True)
def ipo(logps: LogProbs, *, tau: float = 0.1) -> Array:
    """IPO: `(z - 1 / (2 tau))^2`, on LENGTH-NORMALISED log-probabilities.

    Args:
        tau: > 0; `1 / (2 tau)` is the margin that training aims at.

    Source: Azar et al., arXiv 2310.12036, equation 17. The paper writes log-probabilities of whole responses; TRL and
    the comparisons since average them, as here. tau 0.1 is TRL's default.
    """
    return (logps.z_per_token - 1 / (2 * tau)) ** 2


@objective(paper="Yuan et al., arXiv 2602.11902", needs_reference=True)
def hypo(logps: LogProbs, *, beta: float = 0.1) -> Array:
    """Hybrid DPO: DPO whose reference margin counts only where it is positive.

    `-log sigmoid(beta * ((logp(chosen) - logp(rejected)) - max(0, ref_logp(chosen) - ref_logp(rejected))))`

    Args:
        beta: as in `dpo`.

    Source: Yuan et al., arXiv 2602.11902; beta is DPO's.
    """
    xp = logps.xp
    reference = logps.ref_chosen - logps.ref_rejected
    counted = xp.where(reference > 0, reference, xp.zeros_like(reference))
    return logistic(beta * ((logps.chosen - logps.rejected) - counted), xp)


@objective(paper="Liu et al., arXiv 2405.16436", needs_reference=True, lengths=True)
def rpo(logps: LogProbs, *, beta: float = 0.5, eta: float = 0.2) -> Array:
    """Regularised DPO: `-log sigmoid(beta * z) + eta * -logp(chosen) / |chosen|`, DPO with an SFT term.

    Args:
        beta: as in `dpo`.
        eta: weight of the SFT term, >= 0. The SFT term is the cross-entropy per token.

    Source: Liu et al., arXiv 2405.16436; the SFT term per token as in Pang et al., arXiv 2404.19733. The defaults are
    a place to start from.
    """
    return logistic(beta * logps.z, logps.xp) - eta * logps.chosen_per_token
