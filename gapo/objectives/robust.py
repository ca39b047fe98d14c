"""DPO's objective made robust to wrong labels: by a known share of flips, by the batch, or by a bounded second term.

z is the log-ratio margin on summed log-probabilities, as in `gapo.objectives.with_reference`.
"""

from __future__ import annotations

from gapo._namespace import Array, stop_gradient
from gapo.objective import logistic, pair_losses, reduce, sigmoid
from gapo.objectives.checks import check_settings, log_ratio_margins


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
    xp, z = log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
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
    xp, z = log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    kept, flipped = logistic(beta * z, xp), logistic(-beta * z, xp)
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
    xp, z = log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    scaled = -logistic(beta * z, xp) / beta_prime
    peak = stop_gradient(xp.max(scaled))
    batch_loss = -beta_prime * (peak + xp.log(xp.mean(xp.exp(scaled - peak))))
    return reduce(xp.broadcast_to(batch_loss, z.shape), reduction, xp)


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

    Source: Liang et al., arXiv 2404.04102; alpha 14 and beta 0.1 as in the comparison of Nishimori et al., arXiv
    2505.24709.
    """
    check_settings(beta=beta, alpha=alpha, reduction=reduction)
    xp, z = log_ratio_margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend)
    scale = 4 * alpha / (1 + alpha) ** 2
    return reduce(scale * logistic(beta * z, xp) + scale * alpha * sigmoid(-beta * z, xp), reduction, xp)
