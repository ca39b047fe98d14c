"""The losses of TRL's `DPOTrainer` under its names, but those that other modules hold: its "sigmoid" is `dpo`, "ipo"
is `ipo`, "robust" is `rdpo`.

r is a response's log-ratio log p - log p_ref, and z that of the chosen response minus that of the rejected one, both on
log-probabilities summed over the response (nats) unless a function says otherwise. Values are those of TRL 1.16.
"""

from __future__ import annotations

import math

from gapo._namespace import Array, stop_gradient
from gapo.objective import log_sigmoid, logistic, pair_losses, sigmoid
from gapo.objectives.formulas import objective
from gapo.pairs import LogProbs


@objective(paper="Zhao et al., arXiv 2305.10425", needs_reference=True)
def hinge(logps: LogProbs, *, beta: float = 0.1) -> Array:
    """Hinge loss: `max(0, 1 - beta * z)`. No pull on a pair whose margin has reached `1 / beta`.

    Args:
        beta: as in `dpo`.

    Source: Zhao et al., arXiv 2305.10425 (SLiC), on DPO's rewards as in Liu et al., arXiv 2309.06657. beta is TRL's.
    """
    return pair_losses(logps.z, beta, 0.0, "hinge", 0.0, logps.xp)


@objective(paper="Ji et al., arXiv 2402.00856", needs_reference=True)
def exo_pair(logps: LogProbs, *, beta: float = 0.1, epsilon: float = 1e-3) -> Array:
    """EXO on pairs: the divergence KL(q, p) of q = (s, 1 - s), s = `sigmoid(beta * z)`, from p = (1 - e, e).

    `s * (log s - log(1 - e)) + (1 - s) * (log(1 - s) - log e)`: the reverse of cDPO's divergence.

    Args:
        beta: as in `dpo`.
        epsilon: e, the probability left to the rejected response, in (0, 0.5). TRL calls it `label_smoothing`.

    Source: Ji et al., arXiv 2402.00856, equation 16, and its epsilon of 1e-3. beta is TRL's.
    """
    xp, x = logps.xp, beta * logps.z
    log_e, log_rest = math.log(epsilon), math.log1p(-epsilon)
    chosen, rejected = log_sigmoid(x, xp), log_sigmoid(-x, xp)
    return xp.exp(chosen) * (chosen - log_rest) + xp.exp(rejected) * (rejected - log_e)


@objective(paper="Chen et al., arXiv 2402.05369", needs_reference=True)
def nca_pair(logps: LogProbs, *, beta: float = 0.1) -> Array:
    """NCA on pairs: `-log s(beta r+) - (log s(-beta r+) + log s(-beta r-)) / 2`, s the sigmoid.

    It looks at each response alone, and so keeps the chosen one's likelihood from falling with the other's.

    Args:
        beta: as in `dpo`.

    Source: Chen et al., arXiv 2402.05369. beta is TRL's.
    """
    xp, (chosen, rejected) = logps.xp, _rewards(logps, beta)
    return logistic(chosen, xp) + (logistic(-chosen, xp) + logistic(-rejected, xp)) / 2


@objective(paper="Jung et al., arXiv 2404.04656", needs_reference=True)
def bco_pair(logps: LogProbs, *, beta: float = 0.1) -> Array:
    """BCO on pairs: `-log s(beta r+) - log s(-beta r-)`, s the sigmoid: a classifier of good and bad responses.

    The paper's shift of the rewards by their running mean is not done, as in TRL 1.16.

    Args:
        beta: as in `dpo`.

    Source: Jung et al., arXiv 2404.04656. beta is TRL's.
    """
    chosen, rejected = _rewards(logps, beta)
    return logistic(chosen, logps.xp) + logistic(-rejected, logps.xp)


@objective(paper="Wu et al., arXiv 2405.00675", needs_reference=True)
def sppo_hard(logps: LogProbs, *, beta: float = 0.1) -> Array:
    """SPPO with hard labels: `(r+ - 1 / (2 beta))^2 + (r- + 1 / (2 beta))^2`.

    Args:
        beta: > 0; `1 / (2 beta)` is the log-ratio that each response aims at.

    Source: Wu et al., arXiv 2405.00675, equation 4.7 with a probability of 1 that the chosen response wins. beta is
    TRL's.
    """
    chosen, rejected = _rewards(logps, 1.0)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@objective(paper="Melnyk et al., arXiv 2406.05882", needs_reference=True, batch_statistics=True)
def aot(logps: LogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """AOT: DPO's loss of the policy's margins against the reference's, each list sorted over the batch.

    A pair's policy margin meets the reference margin of the same rank. The policy's distribution of margins is so moved
    above the reference's, whatever the pairs. Sorting is over the pairs of one device.

    Args:
        beta: as in `dpo`.
        label_smoothing: e in [0, 0.5), as in `cdpo`.

    Source: Melnyk et al., arXiv 2406.05882. beta and e are TRL's.
    """
    policy, reference = logps.chosen - logps.rejected, logps.ref_chosen - logps.ref_rejected
    differences = policy - _of_same_rank(policy, reference, logps)
    return pair_losses(differences, beta, 0.0, "sigmoid", label_smoothing, logps.xp)


@objective(paper="Melnyk et al., arXiv 2406.05882", needs_reference=True, batch_statistics=True, coupled=True)
def aot_unpaired(logps: LogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """AOT without pairs: DPO's loss of the chosen against the rejected log-ratios, each list sorted over the batch.

    The loss of a pair is that of its chosen response, which meets the rejected response of the same rank. Sorting is
    over the pairs of one device.

    Args:
        beta: as in `dpo`.
        label_smoothing: e in [0, 0.5), as in `cdpo`.

    Source: Melnyk et al., arXiv 2406.05882. beta and e are TRL's.
    """
    chosen, rejected = _rewards(logps, 1.0)
    differences = chosen - _of_same_rank(chosen, rejected, logps)
    return pair_losses(differences, beta, 0.0, "sigmoid", label_smoothing, logps.xp)


@objective(paper="D'Oosterlinck et al., arXiv 2408.06266", needs_reference=True)
def apo_zero(logps: LogProbs, *, beta: float = 0.1) -> Array:
    """APO-zero: `s(-beta r+) + s(beta r-)`, s the sigmoid, where chosen responses are better than the policy's own.

    The chosen response's likelihood rises, the rejected one's falls.

    Args:
        beta: as in `dpo`.

    Source: D'Oosterlinck et al., arXiv 2408.06266, equation 7. beta is TRL's.
    """
    chosen, rejected = _rewards(logps, beta)
    return sigmoid(-chosen, logps.xp) + sigmoid(rejected, logps.xp)


@objective(paper="D'Oosterlinck et al., arXiv 2408.06266", needs_reference=True)
def apo_down(logps: LogProbs, *, beta: float = 0.1) -> Array:
    """APO-down: `s(beta r+) + s(-beta z)`, s the sigmoid, where chosen responses are worse than the policy's own.

    Both likelihoods fall, the rejected response's more.

    Args:
        beta: as in `dpo`.

    Source: D'Oosterlinck et al., arXiv 2408.06266, equation 8. beta is TRL's.
    """
    chosen, rejected = _rewards(logps, beta)
    return sigmoid(chosen, logps.xp) + sigmoid(rejected - chosen, logps.xp)


@objective(paper="Lu et al., arXiv 2406.08414", needs_reference=True)
def discopop(logps: LogProbs, *, beta: float = 0.1, tau: float = 0.05) -> Array:
    """DiscoPOP: `-(1 - m) log s(x) + m exp(-x)` with `x = beta * z`, `m = s(x / tau)`, s the sigmoid.

    Logistic where the pair is wrong, exponential where it is right.

    Args:
        beta: as in `dpo`.
        tau: width of the passage from one to the other, > 0.

    Source: Lu et al., arXiv 2406.08414, equation 5, and its tau. beta is TRL's.
    """
    xp, x = logps.xp, beta * logps.z
    # m exp(-x) as one exponential: for a pair that is far wrong it is 0 * infinity otherwise
    return sigmoid(-x / tau, xp) * logistic(x, xp) + xp.exp(log_sigmoid(x / tau, xp) - x)


@objective(paper="Lambert et al., arXiv 2411.15124", needs_reference=True, average=True)
def sigmoid_norm(logps: LogProbs, *, beta: float = 5.0) -> Array:
    """Length-normalised DPO: `-log sigmoid(beta * z)`, on LENGTH-NORMALISED log-probabilities.

    Args:
        beta: strength of the pull towards the reference, > 0; per token, and so far larger than DPO's.

    Source: Lambert et al., arXiv 2411.15124 (Tulu 3), and its beta. TRL's default of 0.1 is DPO's.
    """
    return logistic(beta * logps.z_per_token, logps.xp)


def _rewards(logps: LogProbs, beta: float) -> tuple[Array, Array]:
    """(beta r+, beta r-), (N,) each."""
    return beta * (logps.chosen - logps.ref_chosen), beta * (logps.rejected - logps.ref_rejected)


def _of_same_rank(x: Array, y: Array, logps: LogProbs) -> Array:
    """(N,): for each entry of `x` the entry of `y` that stands where it stands when both are sorted."""
    xp = logps.xp
    by_rank, ranks = xp.argsort(stop_gradient(y)), xp.argsort(xp.argsort(stop_gradient(x)))
    return xp.take(y, xp.take(by_rank, ranks, axis=0), axis=0)
