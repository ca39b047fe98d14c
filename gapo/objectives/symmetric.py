"""Symmetric losses of the difference d of two clipped rewards: l(d) + l(-d) is constant.

The mean loss under random flips is then the mean loss on true labels, scaled and shifted: least where that is least.
"""

from __future__ import annotations

from gapo._namespace import Array, Namespace
from gapo.objective import reduce, sigmoid
from gapo.objectives.checks import check_settings, policy_and_reference


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

    A reward is `beta * (logp - ref_logp)`, clipped to [-clip, clip].

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

    Source: Nishimori et al., arXiv 2505.24709; beta and clip are its settings.
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

    Source: Nishimori et al., arXiv 2505.24709; beta and clip are its settings.
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

    Source: Nishimori et al., arXiv 2505.24709; beta and clip are its settings.
    """
    check_settings(beta=beta, clip=clip, reduction=reduction)
    xp, d = _reward_differences(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip, backend)
    return reduce(1 - d, reduction, xp)


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
    xp, (chosen, rejected, ref_chosen, ref_rejected) = policy_and_reference(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend
    )
    bounds = (-float(clip), float(clip))
    return xp, xp.clip(beta * (chosen - ref_chosen), *bounds) - xp.clip(beta * (rejected - ref_rejected), *bounds)
