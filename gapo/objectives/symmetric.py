"""Symmetric losses of the difference d of two clipped rewards: l(d) + l(-d) is constant.

The mean loss under random flips is then the mean loss on true labels, scaled and shifted: least where that is least.
A reward is `beta * (logp - ref_logp)`, clipped to [-clip, clip]; beyond it no gradient flows.
"""

from __future__ import annotations

from gapo._namespace import Array
from gapo.objective import sigmoid
from gapo.objectives.formulas import objective
from gapo.pairs import LogProbs

_PAPER = "Nishimori et al., arXiv 2505.24709"


@objective(paper=_PAPER, needs_reference=True)
def sigmoid_loss(logps: LogProbs, *, beta: float = 0.1, clip: float = 10.0) -> Array:
    """Symmetric sigmoid loss: `sigmoid(-d)`, with d the difference of the two responses' clipped rewards.

    Args:
        beta: scale of a reward, > 0.
        clip: bound of a response's reward, > 0.

    Source: Nishimori et al., arXiv 2505.24709; beta and clip are its settings.
    """
    return sigmoid(-_reward_differences(logps, beta, clip), logps.xp)


@objective(paper=_PAPER, needs_reference=True)
def ramp(logps: LogProbs, *, beta: float = 0.1, clip: float = 10.0) -> Array:
    """Symmetric ramp loss: `min(1, max(0, (1 - d) / 2))`, with d as in `sigmoid_loss`.

    Args:
        beta: as in `sigmoid_loss`.
        clip: as in `sigmoid_loss`.

    Source: Nishimori et al., arXiv 2505.24709; beta and clip are its settings.
    """
    return logps.xp.clip(0.5 - 0.5 * _reward_differences(logps, beta, clip), 0.0, 1.0)


@objective(paper=_PAPER, needs_reference=True)
def unhinged(logps: LogProbs, *, beta: float = 0.1, clip: float = 10.0) -> Array:
    """Symmetric unhinged loss: `1 - d`, with d as in `sigmoid_loss`: linear, bounded by the clipping alone.

    Args:
        beta: as in `sigmoid_loss`.
        clip: as in `sigmoid_loss`.

    Source: Nishimori et al., arXiv 2505.24709; beta and clip are its settings.
    """
    return 1 - _reward_differences(logps, beta, clip)


def _reward_differences(logps: LogProbs, beta: float, clip: float) -> Array:
    """The difference (N,) of the two rewards, each clipped to [-clip, clip]."""
    bounds = (-float(clip), float(clip))
    chosen, rejected = logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected
    return logps.xp.clip(beta * chosen, *bounds) - logps.xp.clip(beta * rejected, *bounds)
