"""The objectives: GAPO's and those that it is compared with, as functions of log-probabilities on any array library.

Each function says what it needs: summed or length-normalised log-probabilities, a reference, lengths, the whole batch.
`OBJECTIVES` holds them by name in one form for callers: `OBJECTIVES["dpo"].losses(LogProbs(...), beta=0.1)`. A name
with a "+" weights one of them: `OBJECTIVES["gapo+dpo"]` does so by the anchor gap.
"""

from gapo.objectives.anchored import gapo_capped, gapo_simpo, gapo_target, margin_target
from gapo.objectives.loss import Loss, resolve
from gapo.objectives.registry import OBJECTIVES, Objective, find
from gapo.objectives.robust import cdpo, dr_dpo, rdpo, ropo
from gapo.objectives.symmetric import ramp, sigmoid_loss, unhinged
from gapo.objectives.weighted import WEIGHTINGS
from gapo.objectives.with_reference import dpo, hypo, ipo, rpo
from gapo.objectives.without_reference import amapo, simpo
from gapo.pairs import LogProbs

# The modules above register their objectives as they are imported. Lists and tables show them in this order.
_ORDER = (
    "gapo simpo gapo_simpo gapo_capped gapo_target margin_target amapo dpo cdpo rdpo dr_dpo ipo ropo hypo rpo "
    "sigmoid_loss ramp unhinged"
)
for _name in _ORDER.split():
    OBJECTIVES[_name] = OBJECTIVES.pop(_name)

__all__ = [
    "OBJECTIVES",
    "WEIGHTINGS",
    "LogProbs",
    "Loss",
    "Objective",
    "amapo",
    "cdpo",
    "dpo",
    "dr_dpo",
    "find",
    "gapo_capped",
    "gapo_simpo",
    "gapo_target",
    "hypo",
    "ipo",
    "margin_target",
    "ramp",
    "rdpo",
    "resolve",
    "ropo",
    "rpo",
    "sigmoid_loss",
    "simpo",
    "unhinged",
]
