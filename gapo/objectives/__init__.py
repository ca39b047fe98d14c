"""The objectives: GAPO's and those that it is compared with, as functions of log-probabilities on any array library.

Each function says what it needs: summed or length-normalised log-probabilities, a reference, lengths, the whole batch.
`OBJECTIVES` holds them by name in one form for callers: `OBJECTIVES["dpo"].losses(LogProbs(...), beta=0.1)`. A name
with a "+" weights one of them: `OBJECTIVES["gapo+dpo"]` does so by the anchor gap.
"""

from gapo.objectives.anchored import gapo_capped, gapo_re_po, gapo_simpo, gapo_target, margin_target
from gapo.objectives.batch_adaptive import alpha_dpo, amapo, beta_dpo, re_po
from gapo.objectives.loss import Loss, resolve
from gapo.objectives.registry import OBJECTIVES, Objective, find
from gapo.objectives.robust import cdpo, dr_dpo, rdpo, ropo
from gapo.objectives.symmetric import ramp, sigmoid_loss, unhinged
from gapo.objectives.trl_losses import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    exo_pair,
    hinge,
    nca_pair,
    sigmoid_norm,
    sppo_hard,
)
from gapo.objectives.weighted import WEIGHTINGS
from gapo.objectives.with_reference import cal_dpo, dpo, hypo, ipo, r_dpo, rpo
from gapo.objectives.without_reference import simper, simpo
from gapo.pairs import LogProbs

# The modules above register their objectives as they are imported. Lists and tables show them in this order.
_ORDER = """
    gapo simpo gapo_simpo gapo_capped gapo_target margin_target simper amapo alpha_dpo
    dpo ipo sigmoid_norm hypo rpo r_dpo cal_dpo
    hinge discopop exo_pair nca_pair bco_pair sppo_hard apo_zero apo_down aot aot_unpaired
    cdpo rdpo dr_dpo ropo re_po gapo_re_po beta_dpo sigmoid_loss ramp unhinged
"""
for _name in _ORDER.split():
    OBJECTIVES[_name] = OBJECTIVES.pop(_name)

__all__ = [
    "OBJECTIVES",
    "WEIGHTINGS",
    "LogProbs",
    "Loss",
    "Objective",
    "alpha_dpo",
    "amapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "beta_dpo",
    "cal_dpo",
    "cdpo",
    "discopop",
    "dpo",
    "dr_dpo",
    "exo_pair",
    "find",
    "gapo_capped",
    "gapo_re_po",
    "gapo_simpo",
    "gapo_target",
    "hinge",
    "hypo",
    "ipo",
    "margin_target",
    "nca_pair",
    "r_dpo",
    "ramp",
    "rdpo",
    "re_po",
    "resolve",
    "ropo",
    "rpo",
    "sigmoid_loss",
    "sigmoid_norm",
    "simper",
    "simpo",
    "sppo_hard",
    "unhinged",
]
