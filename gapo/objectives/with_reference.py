"""Objectives that compare the policy with a reference policy, most often the one that training started from.

z = (logp(chosen) - logp(rejected)) - (ref_logp(chosen) - ref_logp(rejected)), on log-probabilities summed over the
response (nats) unless a function says otherwise. Reference log-probabilities carry no gradient, ever.
"""

from __future__ import annotations

from gapo._namespace import Array, Namespace, stop_gradient
from gapo.objective import log_sigmoid, pair_losses, reduce, sigmoid
from gapo.objectives.checks import check_settings, prepare


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
    xp, z = _log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    return reduce(_logistic(beta * z, xp), reduction, xp)


def cdpo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """Conservative DPO: `-(1 - e) log sigmoid(beta * z) - e log sigmoid(-beta * z)`, least at a finite z.

    Args:
        chosen_logps: (N,) summed log-probabilities, nats; this and the next three as in `dpo`.
        rejected_logps: (N,) likewise.
        ref_chosen_logps: (N,) likewise, under the reference.
        ref_rejected_logps: (N,) likewise, under the reference.
        beta: as in `dpo`.
        label_smoothing: e, the share of labels thought to be wrong, in [0, 0.5).
        reduction: "mean", "sum" or "none".
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Mitchell, A note on DPO with noisy preferences and relationship to IPO (2023), which tries e of 0.1 to 0.2.
    """
    check_settings(beta=beta, label_smoothing=label_smoothing, reduction=reduction)
    xp, z = _log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    return reduce(pair_losses(z, beta, 0.0, "sigmoid", label_smoothing, xp), reduction, xp)


def rdpo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """Robust DPO: `[-(1 - e) log sigmoid(beta * z) + e log sigmoid(-beta * z)] / (1 - 2 e)`.

    Over labels flipped with probability e its expectation is DPO's loss on the true labels. Below 0 for large z.

    Args:
        chosen_logps: (N,) summed log-probabilities, nats; this and the next three as in `dpo`.
        rejected_logps: (N,) likewise.
        ref_chosen_logps: (N,) likewise, under the reference.
        ref_rejected_logps: (N,) likewise, under the reference.
        beta: as in `dpo`.
        label_smoothing: e, the probability of a flip, in [0, 0.5).
        reduction: "mean", "sum" or "none".
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Chowdhury, Kini, Natarajan, arXiv 2403.00409, whose experiments take e of 0.1.
    """
    check_settings(beta=beta, label_smoothing=label_smoothing, reduction=reduction)
    xp, z = _log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    kept, flipped = _logistic(beta * z, xp), _logistic(-beta * z, xp)
    losses = ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return reduce(losses, reduction, xp)


def dr_dpo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    beta_prime: float = 1.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """Dr. DPO: `-beta' * log mean_i exp(-l_i / beta')` of the batch's DPO losses l_i.

    A pair's weight in the gradient is the softmax of `-l / beta'`: pairs of a large loss count little.

    Args:
        chosen_logps: (N,) summed log-probabilities, nats; this and the next three as in `dpo`. The N pairs are the
            batch that the mean is over.
        rejected_logps: (N,) likewise.
        ref_chosen_logps: (N,) likewise, under the reference.
        ref_rejected_logps: (N,) likewise, under the reference.
        beta: as in `dpo`.
        beta_prime: > 0; the larger, the nearer to the mean of DPO's losses.
        reduction: "mean", "sum" or "none". The loss is the batch's: with "none" each entry is this same number.
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Wu et al., arXiv 2407.07880, whose default beta' is 1.
    """
    check_settings(beta=beta, beta_prime=beta_prime, reduction=reduction)
    xp, z = _log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    scaled = -_logistic(beta * z, xp) / beta_prime
    peak = stop_gradient(xp.max(scaled))
    batch_loss = -beta_prime * (peak + xp.log(xp.mean(xp.exp(scaled - peak))))
    return reduce(xp.broadcast_to(batch_loss, z.shape), reduction, xp)


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
    xp, z = _log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    return reduce((z - 1 / (2 * tau)) ** 2, reduction, xp)


def ropo(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    alpha: float = 14.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """ROPO's loss: `4 a / (1 + a)^2 * -log sigmoid(beta * z) + 4 a^2 / (1 + a)^2 * sigmoid(-beta * z)`.

    The second term bounds the gradient of a pair that disagrees with its label. The paper's filtering and sampling of
    data are not done here.

    Args:
        chosen_logps: (N,) summed log-probabilities, nats; this and the next three as in `dpo`.
        rejected_logps: (N,) likewise.
        ref_chosen_logps: (N,) likewise, under the reference.
        ref_rejected_logps: (N,) likewise, under the reference.
        beta: as in `dpo`.
        alpha: a > 0, the weight of the bounded term over the logistic one.
        reduction: "mean", "sum" or "none".
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Liang et al., arXiv 2404.04102; alpha 14 and beta 0.1 are its settings.
    """
    check_settings(beta=beta, alpha=alpha, reduction=reduction)
    xp, z = _log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    scale = 4 * alpha / (1 + alpha) ** 2
    return reduce(scale * _logistic(beta * z, xp) + scale * alpha * sigmoid(-beta * z, xp), reduction, xp)


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
    xp, (chosen, rejected, ref_chosen, ref_rejected) = prepare(
        backend,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    ref_margins = ref_chosen - ref_rejected
    kept = xp.where(ref_margins > 0, ref_margins, xp.zeros_like(ref_margins))
    return reduce(_logistic(beta * ((chosen - rejected) - kept), xp), reduction, xp)


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

    Source: Liu et al., arXiv 2405.16436.
    """
    check_settings(beta=beta, eta=eta, reduction=reduction)
    xp, z = _log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    _, (chosen, lengths) = prepare(
        backend, chosen_logps=chosen_logps, chosen_lengths=xp.astype(chosen_lengths, z.dtype)
    )
    return reduce(_logistic(beta * z, xp) - eta * chosen / lengths, reduction, xp)


def sigmoid_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    clip: float = 10.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """Symmetric sigmoid loss: `sigmoid(-d)`, with d the difference of the two responses' clipped rewards.

    A reward is `beta * (logp - ref_logp)`, clipped to [-clip, clip]. Symmetric means `l(d) + l(-d)` is constant: the
    mean loss under random flips is least where the mean loss on true labels is.

    Args:
        chosen_logps: (N,) summed log-probabilities, nats; this and the next three as in `dpo`.
        rejected_logps: (N,) likewise.
        ref_chosen_logps: (N,) likewise, under the reference.
        ref_rejected_logps: (N,) likewise, under the reference.
        beta: as in `dpo`.
        clip: bound of a response's reward, > 0. Beyond it no gradient flows.
        reduction: "mean", "sum" or "none".
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Nishimori et al., arXiv 2505.24709; beta is DPO's.
    """
    check_settings(beta=beta, clip=clip, reduction=reduction)
    xp, d = _reward_differences(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip, backend)
    return reduce(sigmoid(-d, xp), reduction, xp)


def ramp(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    clip: float = 10.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """Symmetric ramp loss: `min(1, max(0, (1 - d) / 2))`, with d as in `sigmoid_loss`.

    Args:
        chosen_logps: (N,) summed log-probabilities, nats; this and the next three as in `dpo`.
        rejected_logps: (N,) likewise.
        ref_chosen_logps: (N,) likewise, under the reference.
        ref_rejected_logps: (N,) likewise, under the reference.
        beta: as in `dpo`.
        clip: as in `sigmoid_loss`.
        reduction: "mean", "sum" or "none".
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Nishimori et al., arXiv 2505.24709; beta is DPO's.
    """
    check_settings(beta=beta, clip=clip, reduction=reduction)
    xp, d = _reward_differences(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip, backend)
    return reduce(xp.clip(0.5 - 0.5 * d, 0.0, 1.0), reduction, xp)


def unhinged(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    clip: float = 10.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Array:
    """Symmetric unhinged loss: `1 - d`, with d as in `sigmoid_loss`: linear, bounded by the clipping alone.

    Args:
        chosen_logps: (N,) summed log-probabilities, nats; this and the next three as in `dpo`.
        rejected_logps: (N,) likewise.
        ref_chosen_logps: (N,) likewise, under the reference.
        ref_rejected_logps: (N,) likewise, under the reference.
        beta: as in `dpo`.
        clip: as in `sigmoid_loss`.
        reduction: "mean", "sum" or "none".
        backend: as in `dpo`.

    Returns:
        Scalar, or (N,) for reduction="none", as `dpo`.

    Raises:
        TypeError, ValueError: as `dpo`.

    Source: Nishimori et al., arXiv 2505.24709; beta is DPO's.
    """
    check_settings(beta=beta, clip=clip, reduction=reduction)
    xp, d = _reward_differences(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip, backend)
    return reduce(1 - d, reduction, xp)


def _logistic(x: Array, xp: Namespace) -> Array:
    """-log sigmoid(x)."""
    return -log_sigmoid(x, xp)


def _log_ratio_margins(
    chosen_logps: Array, rejected_logps: Array, ref_chosen_logps: Array, ref_rejected_logps: Array, backend: str | None
) -> tuple[Namespace, Array]:
    """The arrays' namespace, and z (N,)."""
    xp, (chosen, rejected, ref_chosen, ref_rejected) = prepare(
        backend,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    return xp, (chosen - rejected) - (ref_chosen - ref_rejected)


def _reward_differences(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    beta: float,
    clip: float,
    backend: str | None,
) -> tuple[Namespace, Array]:
    """The arrays' namespace, and the difference (N,) of the two rewards, each clipped to [-clip, clip]."""
    xp, (chosen, rejected, ref_chosen, ref_rejected) = prepare(
        backend,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    bounds = (-float(clip), float(clip))
    return xp, xp.clip(beta * (chosen - ref_chosen), *bounds) - xp.clip(beta * (rejected - ref_rejected), *bounds)
