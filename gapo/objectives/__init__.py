"""The objectives that GAPO is compared with, as functions of log-probabilities on any array library.

Each function says what it needs: summed or length-normalised log-probabilities, a reference, lengths, the whole batch.
`OBJECTIVES` holds them by name in one form for callers: `OBJECTIVES["dpo"].losses(LogProbs(...), beta=0.1)`.
"""

from gapo.objectives.registry import OBJECTIVES, LogProbs, Objective, find, without_anchor
from gapo.objectives.robust import cdpo, dr_dpo, rdpo, ropo
from gapo.objectives.symmetric import ramp, sigmoid_loss, unhinged
from gapo.objectives.with_reference import dpo, hypo, ipo, rpo
from gapo.objectives.without_reference import amapo, simpo

__all__ = [
    "OBJECTIVES",
    "LogProbs",
    "Objective",
    "amapo",
    "cdpo",
    "dpo",
    "dr_dpo",
    "find",
    "hypo",
    "ipo",
    "ramp",
    "rdpo",
    "ropo",
    "rpo",
    "sigmoid_loss",
    "simpo",
    "unhinged",
    "without_anchor",
]
