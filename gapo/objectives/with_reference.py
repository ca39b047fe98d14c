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


@objective(paper="Liu et al., arXiv 2405.16436", needs_reference=True, lengths=("chosen",))
def rpo(logps: LogProbs, *, beta: float = 0.5, eta: float = 0.2) -> Array:
    """Regularised DPO: `-log sigmoid(beta * z) + eta * -logp(chosen) / |chosen|`, DPO with an SFT term.

    Args:
        beta: as in `dpo`.
        eta: weight of the SFT term, >= 0. The SFT term is the cross-entropy per token.

    Source: Liu et al., arXiv 2405.16436; the SFT term per token as in Pang et al., arXiv 2404.19733. The defaults are
    those of the appendix of Liu et al., whose SFT term is per token too. Its main runs take beta 0.01 to 0.05 and
    weight the SUMMED log-probability by `0.005 * beta`.
    """
    return logistic(beta * logps.z, logps.xp) - eta * logps.chosen_per_token


@objective(paper="Park et al., arXiv 2403.19159", needs_reference=True, lengths=("chosen", "rejected"))
def r_dpo(logps: LogProbs, *, beta: float = 0.1, alpha: float = 0.05) -> Array:
    """Length-regularised DPO: `-log sigmoid(beta * z + alpha * (|chosen| - |rejected|))`, lengths in tokens.

    DPO for rewards from which `alpha` is taken for each token. A chosen response that is the longer one is pulled less.

    Args:
        beta: as in `dpo`.
        alpha: price of a token, > 0.

    Source: Park et al., arXiv 2403.19159; alpha 0.05 is the least of those that Meng, Xia and Chen, arXiv 2405.14734,
    try.
    """
    xp, z = logps.xp, logps.z
    longer = xp.astype(logps.chosen_lengths, z.dtype) - xp.astype(logps.rejected_lengths, z.dtype)
    return logistic(beta * z + alpha * longer, xp)


@objective(paper="Xiao et al., arXiv 2412.14516", needs_reference=True)
def cal_dpo(logps: LogProbs, *, beta: float = 0.001) -> Array:
    """Calibrated DPO: `-log sigmoid(z) + ((r+ - 1 / (2 beta))^2 + (r- + 1 / (2 beta))^2) / 2`.

    r is a response's log-ratio log p - log p_ref. DPO's term alone would let both fall together.

    Args:
        beta: > 0; `1 / (2 beta)` is the log-ratio that each response aims at.

    Source: Xiao et al., arXiv 2412.14516, and its authors' code, whose beta is 0.001 to 0.002.
    """
    chosen, rejected = logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected
    calibration = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return logistic(logps.z, logps.xp) + calibration / 2
