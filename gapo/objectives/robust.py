"""DPO's objective made robust to wrong labels: by a known share of flips, by the batch, or by a bounded second term.

z is the log-ratio margin on summed log-probabilities, as in `gapo.objectives.with_reference`.
"""

from __future__ import annotations

from gapo._namespace import Array, stop_gradient
from gapo.objective import logistic, pair_losses, sigmoid
from gapo.objectives.formulas import objective
from gapo.pairs import LogProbs


@objective(paper="Mitchell, A note on DPO with noisy preferences (2023)", needs_reference=True)
def cdpo(logps: LogProbs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Array:
    """Conservative DPO: `-(1 - e) log sigmoid(beta * z) - e log sigmoid(-beta * z)`, least at a finite z.

    Args:
        beta: as in `dpo`.
        label_smoothing: e, the share of labels thought to be wrong, in [0, 0.5).

    Source: Mitchell, A note on DPO with noisy preferences and relationship to IPO (2023), which tries e of 0.1 to 0.2.
    """
    return pair_losses(logps.z, beta, 0.0, "sigmoid", label_smoothing, logps.xp)


@objective(paper="Chowdhury, Kini, Natarajan, arXiv 2403.00409", needs_reference=True)
def rdpo(logps: LogProbs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Array:
    """Robust DPO: `[-(1 - e) log sigmoid(beta * z) + e log sigmoid(-beta * z)] / (1 - 2 e)`.

    Over labels flipped with probability e its expectation is DPO's loss on the true labels. Below 0 for large z.

    Args:
        beta: as in `dpo`.
        label_smoothing: e, the probability of a flip, in [0, 0.5).

    Source: Chowdhury, Kini, Natarajan, arXiv 2403.00409, whose experiments take e of 0.1.
    """
    e = label_smoothing
    agreeing, flipped = logistic(beta * logps.z, logps.xp), logistic(-beta * logps.z, logps.xp)
    return ((1 - e) * agreeing - e * flipped) / (1 - 2 * e)


@objective(paper="Wu et al., arXiv 2407.07880", needs_reference=True, batch_statistics=True, coupled=True)
def dr_dpo(logps: LogProbs, *, beta: float = 0.1, beta_prime: float = 1.0) -> Array:
    """Dr. DPO: `-beta' * log mean_i exp(-l_i / beta')` of the batch's DPO losses l_i.

    A pair's weight in the gradient is the softmax of `-l / beta'`: pairs of a large loss count little. The loss is the
    batch's: with reduction="none" each entry is this same number.

    Args:
        beta: as in `dpo`.
        beta_prime: > 0; the larger, the nearer to the mean of DPO's losses.

    Source: Wu et al., arXiv 2407.07880, whose default beta' is 1.
    """
    xp = logps.xp
    scaled = -logistic(beta * logps.z, xp) / beta_prime
    peak = stop_gradient(xp.max(scaled))
    return xp.broadcast_to(-beta_prime * (peak + xp.log(xp.mean(xp.exp(scaled - peak)))), scaled.shape)


@objective(paper="Liang et al., arXiv 2404.04102", needs_reference=True)
def ropo(logps: LogProbs, *, beta: float = 0.1, alpha: float = 14.0) -> Array:
    """ROPO's loss: `4 a / (1 + a)^2 * -log sigmoid(beta * z) + 4 a^2 / (1 + a)^2 * sigmoid(-beta * z)`.

    The second term bounds the gradient of a pair that disagrees with its label. The paper's filtering and sampling of
    data are not done here.

    Args:
        beta: as in `dpo`.
        alpha: a > 0, the weight of the bounded term over the logistic one.

    Source: Liang et al., arXiv 2404.04102; alpha 14 and beta 0.1 as in the comparison of Nishimori et al., arXiv
    2505.24709.
    """
    scale = 4 * alpha / (1 + alpha) ** 2
    return scale * logistic(beta * logps.z, logps.xp) + scale * alpha * sigmoid(-beta * logps.z, logps.xp)
