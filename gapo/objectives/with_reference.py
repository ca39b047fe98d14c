"""Objectives that compare the policy with a reference policy, most often the one that training started from.

z = (logp(chosen) - logp(rejected)) - (ref_logp(chosen) - ref_logp(rejected)), on log-probabilities summed over the
response (nats) unless a function says otherwise. Reference log-probabilities carry no gradient, ever.
"""

from __future__ import annotations

from gapo._namespace import Array, namespace
from gapo.objective import logistic, reduce
from gapo.objectives.checks import check_settings, log_ratio_margins, policy_and_reference, prepare


def dpo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """DPO: `-log sigmoid(beta * z)`.

    Args:
        chosen_logps: (N,) summed log-probability of each chosen response under the policy, nats.
        rejected_logps: (N,) the same of each rejected response.
        ref_chosen_logps: (N,) the same of each chosen response under the reference. Carries no gradient, ever.
        ref_rejected_logps: (N,) the same of each rejected response under the reference. Carries no gradient, ever.
        beta: strength of the pull towards the reference, > 0.
        reduction: "mean", "sum" or "none".
        backend: "numpy", "torch", "jax" or "mlx" to state the library; None finds it from the arrays.

    Returns:
        Scalar, or (N,) for reduction="none"; float32 or wider, differentiable in the first two arguments.

    Raises:
        TypeError: an argument is not an array, not floating point, or not of the library stated or of the others.
        ValueError: shapes differ or are not (N,) with N >= 1, or a setting is out of its range.

    Source: Rafailov et al., arXiv 2305.18290; beta 0.1 is its default for dialogue.

    >>> import numpy as np
    >>> round(float(dpo(np.array([-10.0]), np.array([-12.0]), np.array([-11.0]), np.array([-11.0]))), 4)
    0.5981
    """
    check_settings(beta=beta, reduction=reduction)
    xp, z = log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    return reduce(logistic(beta * z, xp), reduction, xp)


def ipo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    tau: float = 0.1,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """IPO: `(z - 1 / (2 tau))^2`, on LENGTH-NORMALISED log-probabilities.

    Args:
        chosen_logps: (N,) length-normalised log-probability of each chosen response under the policy, nats per token.
        rejected_logps: (N,) the same of each rejected response.
        ref_chosen_logps: (N,) the same of each chosen response under the reference. Carries no gradient, ever.
        ref_rejected_logps: (N,) the same of each rejected response under the reference. Carries no gradient, ever.
        tau: > 0; `1 / (2 tau)` is the margin that training aims at.
        reduction: "mean", "sum" or "none".
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Azar et al., arXiv 2310.12036, equation 17; the paper writes log-probabilities of whole responses, TRL and
    the comparisons since average them, as here. tau 0.1 is TRL's default.
    """
    check_settings(tau=tau, reduction=reduction)
    xp, z = log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    return reduce((z - 1 / (2 * tau)) ** 2, reduction, xp)


def hypo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """Hybrid DPO: DPO whose reference margin counts only where it is positive.

    `-log sigmoid(beta * ((logp(chosen) - logp(rejected)) - max(0, ref_logp(chosen) - ref_logp(rejected))))`

    Args:
        chosen_logps: (N,) summed log-probabilities, nats; this and the next three as in `dpo`.
        rejected_logps: (N,) likewise.
        ref_chosen_logps: (N,) likewise, under the reference.
        ref_rejected_logps: (N,) likewise, under the reference.
        beta: as in `dpo`.
        reduction: "mean", "sum" or "none".
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Yuan et al., arXiv 2602.11902; beta is DPO's.
    """
    check_settings(beta=beta, reduction=reduction)
    xp, (chosen, rejected, ref_chosen, ref_rejected) = policy_and_reference(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend
    )
    ref_margins = ref_chosen - ref_rejected
    kept = xp.where(ref_margins > 0, ref_margins, xp.zeros_like(ref_margins))
    return reduce(logistic(beta * ((chosen - rejected) - kept), xp), reduction, xp)


def rpo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    chosen_lengths: Array,
    *,
    beta: float = 0.5,
    eta: float = 0.2,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """Regularised DPO: `-log sigmoid(beta * z) + eta * -logp(chosen) / |chosen|`, DPO with an SFT term.

    Args:
        chosen_logps: (N,) summed log-probabilities, nats; this and the next three as in `dpo`.
        rejected_logps: (N,) likewise.
        ref_chosen_logps: (N,) likewise, under the reference.
        ref_rejected_logps: (N,) likewise, under the reference.
        chosen_lengths: (N,) number of tokens of each chosen response, >= 1, integers or floats: the SFT term is the
            cross-entropy per token.
        beta: as in `dpo`.
        eta: weight of the SFT term, >= 0.
        reduction: "mean", "sum" or "none".
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Liu et al., arXiv 2405.16436; the SFT term per token as in Pang et al., arXiv 2404.19733. The defaults are
    a place to start from.
    """
    check_settings(beta=beta, eta=eta, reduction=reduction)
    xp, z = log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    namespace(backend, chosen_logps=chosen_logps, chosen_lengths=chosen_lengths)  # before it is taken for an array
    _, (chosen, lengths) = prepare(
        backend, chosen_logps=chosen_logps, chosen_lengths=xp.astype(chosen_lengths, z.dtype)
    )
    return reduce(logistic(beta * z, xp) - eta * chosen / lengths, reduction, xp)
